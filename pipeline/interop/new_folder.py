"""Where an export may write."""

from pathlib import Path

from pipeline.errors import ArtifactError


def check_new(out: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        ArtifactError: `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} exists already: name a new folder, or remove it")
