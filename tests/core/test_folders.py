"""Folders that take each other's place."""

from pathlib import Path

from pipeline.core import folders
from tests.core.test_artifacts import snapshot


def test_two_paths_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    if folders._exchange(tmp_path / "one", tmp_path / "other"):  # else this file system cannot
        assert snapshot(tmp_path) == {"one/other.txt": b"other", "other/one.txt": b"one"}
    else:
        assert snapshot(tmp_path) == {"one/one.txt": b"one", "other/other.txt": b"other"}
