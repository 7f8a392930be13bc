"""Digests of sources: of a file's bytes, of a folder's files, and whether DVC watches a place."""

import hashlib
from pathlib import Path

import pytest

from pipeline.core.readers import HubSource, LocalSource
from pipeline.core.sources import SourceDigests, changed, is_within, path_sha256


def test_a_source_is_known_by_the_bytes_of_its_file_once_it_was_read(workspace: Path) -> None:
    Path("in").mkdir()
    Path("in/a.txt").write_bytes(b"one\ntwo\n")
    elsewhere = workspace / "b.txt"
    elsewhere.write_bytes(b"three\n")
    digests = SourceDigests(Path("in"))
    assert list(digests.read(LocalSource(kind="local", path="a.txt", limit=1))) == ["one"]
    assert list(digests.read(LocalSource(kind="local", path=str(elsewhere)))) == ["three"]
    assert digests.found == {
        "in/a.txt": hashlib.sha256(b"one\ntwo\n").hexdigest(),
        elsewhere.as_posix(): hashlib.sha256(b"three\n").hexdigest(),
    }


def test_a_data_set_of_the_hub_is_known_by_the_texts_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = HubSource(kind="hub", name="org/data", column="text"), set()
    for texts in (["ab", "c"], ["a", "bc"], ["ab", "c"]):
        monkeypatch.setattr("pipeline.core.sources.read_texts", lambda *_, texts=texts: iter(texts))
        digests = SourceDigests(Path())
        assert list(digests.read(source)) == texts
        found |= set(digests.found.items())
    assert {name for name, _ in found} == {"hub:org/data/default/train/text"}
    assert len(found) == 2


def test_a_folder_is_known_by_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    first = path_sha256(folder)
    (folder / "a.txt").rename(folder / "b.txt")
    renamed = path_sha256(folder)
    (folder / "b.txt").write_text("y")
    assert len({first, renamed, path_sha256(folder), None}) == 4
    assert path_sha256(tmp_path / "nowhere") is None
    assert path_sha256(folder / "*.txt") == path_sha256(folder)
    assert path_sha256(folder / "a*.txt") is None


def test_changed_and_absent_sources(workspace: Path) -> None:
    for name in ("same", "other"):
        Path(name).write_text(name)
    recorded = {name: path_sha256(Path(name)) for name in ("same", "other")} | {"gone": "0" * 64, "hub:org/x": "1" * 64}
    Path("other").write_text("now")
    assert changed(recorded, Path()) == ({"other": path_sha256(Path("other"))}, ["gone"])  # type: ignore[arg-type]


def test_a_place_behind_a_link_to_a_folder_is_elsewhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "deep", outside):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("x")
    (inside / "linked").symlink_to(outside)
    (inside / "file.txt").symlink_to(outside / "a.txt")
    places = ["deep/a.txt", "deep", "missing.txt", "file.txt", "../out/a.txt", "linked/a.txt", "linked", str(outside)]
    assert [is_within(inside / place, inside) for place in places] == [True] * 4 + [False] * 4
