"""Files: whole or not at all, and errors of the disk that name the place."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.core.errors import WorkError
from pipeline.core.files import digest_of, disk_errors, write_json


def test_a_written_file_replaces_the_old_one_and_is_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    for value in (1, 2):
        write_json(path, {"b": value, "a": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ä",\n  "b": 2\n}\n'
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_digests_do_not_depend_on_key_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_a_full_disk_under_a_single_file(small_disk: Path) -> None:
    path = small_disk / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(WorkError, match=r"cannot write .*facts.json: No space left on device"):
        write_json(path, {"a": "x" * 3 * 2**20})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "data/input.txt"), "cannot open data/input.txt: Permission denied"),
        (
            PermissionError(13, "Failed to open local file 'data/input.parquet'. Detail: [errno 13] Permission denied"),
            "cannot open data/input.parquet: Permission denied",
        ),
        (PermissionError(13, "Permission denied", "data/out/a.parquet"), "cannot write data/out: Permission denied"),
        (PermissionError(13, "Permission denied", "data/.out.tmp-1/new"), "cannot write data/out: Permission denied"),
        (PermissionError(13, "Permission denied", "data"), "cannot write data/out: Permission denied"),
        (OSError(30, "Read-only file system", "data/out"), "cannot write data/out: Read-only file system"),
        (SafetensorError("I/O error: Full (os error 28)"), "cannot write data/out: No space left on device"),
        (
            shutil.Error([("a", "data/out/a", "[Errno 28] No space left on device")]),
            "cannot write data/out: No space left on device",
        ),
    ],
)
def test_an_error_names_the_file_that_it_is_about(error: Exception, message: str) -> None:
    with pytest.raises(WorkError, match=f"^{re.escape(message)}"), disk_errors(Path("data/out")):
        raise error
