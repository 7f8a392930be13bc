from pathlib import Path

import pytest

from tests.evaluate.fakes import classification_folder, retrieval_folder, sts_folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        retrieval_folder(tmp_path / "find"),
        sts_folder(tmp_path / "pairs"),
        classification_folder(tmp_path / "sort"),
    ]
