"""The workspace of one set of batches."""

from pathlib import Path

from bench.training_step.workload import Rows, save


def with_batches(base: Path, folder: Path, batches: list[Rows]) -> Path:
    """A workspace that shares all with `base` but its batches."""
    folder.mkdir()
    for part in base.iterdir():
        if part.name in ("backbone", "reference-source", "student.safetensors"):
            (folder / part.name).symlink_to(part)
    save(folder / "batches.json", batches)
    return folder
