"""The workspace of a comparison: the backbone, the student's weights and the batches that both sides read."""

import json
from collections.abc import Iterator
from pathlib import Path

from bench.common import BACKBONE, ROOT
from bench.training_step.reference_env import SOURCE, readable_backbone
from bench.training_step.workload import Rows, save

TOKENS = 10


def text_stream() -> list[int]:
    """The demo's documents as one row of token ids."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(BACKBONE)("\n".join(_texts()), verbose=False)["input_ids"])


def _texts() -> Iterator[str]:
    for path in sorted((ROOT / "data" / "demo" / "tasks").rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield str(json.loads(line).get("text", ""))


def write_student(path: Path) -> None:
    """A student as the paper starts it, its teacher as wide as the backbone, rounded to bfloat16.

    Rounded, because the reference trains in the backbone's precision: both sides start from the same numbers.
    """
    from safetensors.torch import save_file

    from pipeline.backbone import BackboneParams, load_backbone
    from pipeline.encoder.student import new_student

    backbone = load_backbone(BackboneParams(name=str(BACKBONE)))
    width = backbone.config.hidden_size
    student = new_student(backbone, width, compression_tokens=TOKENS, thought_tokens=0, seed=0)
    save_file({name: tensor.bfloat16().float() for name, tensor in student.state_dict().items()}, path)


def prepare_workspace(folder: Path) -> None:
    """Fill a new folder with all but the batches."""
    folder.mkdir(parents=True)
    readable_backbone(BACKBONE, folder / "backbone")
    (folder / "reference-source").symlink_to(SOURCE)
    write_student(folder / "student.safetensors")


def with_batches(base: Path, folder: Path, batches: list[Rows]) -> Path:
    """A workspace that shares all with `base` but its batches."""
    folder.mkdir()
    for part in base.iterdir():
        if part.name in ("backbone", "reference-source", "student.safetensors"):
            (folder / part.name).symlink_to(part)
    save(folder / "batches.json", batches)
    return folder
