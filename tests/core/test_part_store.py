"""Parts of long work: found again by what they were made of, torn ones noticed; files whole or not there."""

from pathlib import Path

import pytest

from pipeline.core.errors import WorkError
from pipeline.core.part_store import Parts, open_parts, whole_file


def test_a_part_is_found_by_its_place_and_what_it_was_made_of(workspace: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_parts("s", {"a": 1}, ".x") as parts:
        parts.put(0, ["text"], b"one")
        parts.within("more").put(0, ["text"], b"two")
        raise KeyboardInterrupt
    with open_parts("s", {"a": 2}, ".x") as parts:
        assert parts.find(0, ["text"]) is None
    with open_parts("s", {"a": 1}, ".x") as parts:
        assert parts.find(1, ["text"]) is parts.find(0, ["other"]) is None
        found, more = parts.find(0, ["text"]), parts.within("more").find(0, ["text"])
        assert found is not None and more is not None
        assert (found.read_bytes(), more.read_bytes()) == (b"one", b"two")
    assert not list(Path(".work/s").iterdir())


def test_torn_parts_and_what_a_killed_write_left_go(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_parts("s", {}, ".x") as parts:
        path = parts.put(0, [], b"whole")
        path.write_bytes(b"whol")
        assert parts.find(0, []) is None
        assert not path.exists()
        assert "is damaged" in caplog.text
        assert parts.put(0, [], b"whole") == path
        (path.parent / ".00000001-abc.x.tmp").write_bytes(b"half")
        again = Parts(path.parent, ".x")
        assert again.find(0, []) == path
        assert [file.name for file in path.parent.glob("*.x*")] == [path.name]


def test_one_process_at_a_time(workspace: Path) -> None:
    with open_parts("s", {}, ".x"):
        with pytest.raises(WorkError, match="in use by another process"), open_parts("s", {}, ".x"):
            pass
        with open_parts("s", {"other": 1}, ".x"):
            pass
    with open_parts("s", {}, ".x"):
        pass


def test_a_file_appears_whole(workspace: Path) -> None:
    path = Path("folder/file.txt")
    with whole_file(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
