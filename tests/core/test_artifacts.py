"""Artifacts: whole or not at all, equal bytes for equal work, every damage noticed."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core import artifacts, fault_points
from pipeline.core.artifacts import MANIFEST, Artifact, create, damaged_files, open_artifact, read_manifest
from pipeline.core.errors import ArtifactError, WorkError
from tests.conftest import ROOT


def table(*values: int) -> pa.Table:
    return pa.table({"id": [f"{value:04d}" for value in values], "value": list(values)})


def make(target: Path, *values: int, **more: object) -> Artifact:
    with create(target, kind="numbers", params={"seed": 1}, **more) as out:  # type: ignore[arg-type]
        out.write_table("a.parquet", table(*values))
        out.counts = {"rows": len(values)}
    return open_artifact(target, "numbers")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path / "deep" / "out", 3, 1, 2)
    assert made.read().column("value").to_pylist() == [3, 1, 2]
    assert made.manifest.rows == 3
    assert made.manifest.params == {"seed": 1}
    assert made.manifest.counts == {"rows": 3}
    assert set(made.manifest.files) == {"a.parquet"}
    assert made.manifest.format_version == artifacts.FORMAT_VERSION


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one", 1, 2)
    make(tmp_path / "two", 1, 2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_the_digest_of_an_artifact_changes_with_that_of_its_input(tmp_path: Path) -> None:
    digests = set()
    for value in (1, 2):
        source = make(tmp_path / "source", value)
        assert source.digest not in digests
        made = make(tmp_path / "made", 7, inputs=[source], models={"teacher": {"name": "t"}})
        assert made.manifest.inputs == {str(source.path): source.digest}
        digests |= {source.digest, made.digest}
    assert len(digests) == 4


@pytest.mark.parametrize("cuts", [[], [1], [4096], [5000, 5001, 9000], list(range(100, 9500, 100))])
def test_a_stream_of_tables_has_the_bytes_of_one_table(tmp_path: Path, cuts: list[int]) -> None:
    whole = table(*range(9500))
    pieces = [whole.slice(start, end - start) for start, end in itertools.pairwise([0, *cuts, whole.num_rows])]
    with create(tmp_path / "one", kind="numbers", params={}) as out:
        out.write_table("a.parquet", whole)
    with create(tmp_path / "streamed", kind="numbers", params={}) as out:
        out.write_stream("a.parquet", pieces, whole.schema)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "streamed")


def test_a_stream_of_no_tables_is_an_empty_table(tmp_path: Path) -> None:
    with create(tmp_path / "none", kind="numbers", params={}) as out:
        out.write_stream("a.parquet", [], table().schema)
    assert open_artifact(tmp_path / "none", "numbers").read().num_rows == 0


def test_parts_keep_their_order_and_no_rows_are_an_empty_part(tmp_path: Path) -> None:
    for name, parts in (("many", [table(2), table(1)]), ("none", [])):
        with create(tmp_path / name, kind="numbers", params={}) as out:
            out.write_parts(parts, table().schema)
    assert open_artifact(tmp_path / "many", "numbers").read().column("value").to_pylist() == [2, 1]
    assert open_artifact(tmp_path / "none", "numbers").read().num_rows == 0
    assert [path.name for path in open_artifact(tmp_path / "none", "numbers").tables()] == ["part-00000.parquet"]


def test_an_error_in_the_block_leaves_the_old_artifact_and_no_scratch(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="boom"), create(tmp_path / "out", kind="numbers", params={}) as out:
        out.write_table("a.parquet", table(5))
        raise RuntimeError("boom")
    assert snapshot(tmp_path) == before


def test_a_new_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    with create(tmp_path / "out", kind="numbers", params={}) as out:
        out.write_table("b.parquet", table(2))
    assert set(snapshot(tmp_path)) == {"out/b.parquet", f"out/{MANIFEST}"}


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.tmp-killed"
    leftover.mkdir()
    (leftover / "a.parquet").write_bytes(b"half")
    make(tmp_path / "out", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("point", "left"), [("artifact.commit", [1]), ("artifact.swap", None)])
def test_a_killed_write_leaves_the_old_artifact_or_none_and_the_next_one_is_clean(
    tmp_path: Path, point: str, left: list[int] | None
) -> None:
    make(tmp_path / "out", 1)
    code = "import sys, pathlib; from tests.core.test_artifacts import make; make(pathlib.Path(sys.argv[1]), 2)"
    command, environment = [sys.executable, "-c", code, str(tmp_path / "out")], {fault_points.VARIABLE: f"{point}:1"}
    assert subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == -signal.SIGKILL
    if left is None:
        assert not (tmp_path / "out").exists()
    else:
        assert open_artifact(tmp_path / "out", "numbers").read()["value"].to_pylist() == left
    assert make(tmp_path / "out", 2).read()["value"].to_pylist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [0, 50, -1])
def test_one_flipped_byte_is_found(tmp_path: Path, at: int) -> None:
    make(tmp_path / "out", 1, 2)
    file = tmp_path / "out" / "a.parquet"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a.parquet: sha256 is \w{12}..., the manifest says \w{12}..."):
        open_artifact(tmp_path / "out", "numbers")


def test_every_difference_from_the_manifest_has_its_line(tmp_path: Path) -> None:
    with create(tmp_path / "out", kind="numbers", params={}) as out:
        out.write_parts([table(1), table(2)], table().schema)
    first, second = open_artifact(tmp_path / "out", "numbers").tables()
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    (tmp_path / "out" / "extra.bin").write_bytes(b"x")
    lines = damaged_files(read_manifest(tmp_path / "out"))
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["missing,", "sha256", "not"]
    assert [Path(line.split(": ")[0]).name for line in lines] == [first.name, second.name, "extra.bin"]


def test_reading_a_truncated_parquet_file_is_an_artifact_error(tmp_path: Path) -> None:
    made = make(tmp_path / "out", *range(100))
    file = made.path / "a.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=str(made.path)):
        made.read()


def test_an_unfinished_folder_and_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty is not a finished artifact \(no manifest.json\)"):
        open_artifact(tmp_path / "empty", "numbers")
    make(tmp_path / "out", 1)
    with pytest.raises(ArtifactError, match="out holds 'numbers', expected 'letters'"):
        open_artifact(tmp_path / "out", "letters")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "odd": 2}', "\xff"])
def test_a_damaged_manifest_says_so(tmp_path: Path, content: str) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / "out" / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged \("):
        read_manifest(tmp_path / "out")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    path = tmp_path / "out" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99, this code reads 1"):
        read_manifest(tmp_path / "out")


def test_a_written_file_replaces_the_old_one_and_is_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    for value in (1, 2):
        artifacts.write_json(path, {"b": value, "a": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ä",\n  "b": 2\n}\n'
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_digests_do_not_depend_on_key_order() -> None:
    assert artifacts.digest_of({"a": 1, "b": [1, 2]}) == artifacts.digest_of({"b": [1, 2], "a": 1})
    assert artifacts.digest_of([1, 2]) != artifacts.digest_of([2, 1])


def test_a_full_disk_is_a_work_error_and_leaves_the_target_as_it_was(small_disk: Path) -> None:
    make(small_disk / "out", 1)
    before = snapshot(small_disk)
    noise = pa.table({"id": ["a"], "value": pa.array([os.urandom(3 * 2**20)], pa.binary())})
    message = "cannot write .*/out: No space left on device"
    with pytest.raises(WorkError, match=message), create(small_disk / "out", kind="numbers", params={}) as out:
        out.write_table("a.parquet", noise)
    assert snapshot(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_full_disk_under_a_single_file(small_disk: Path) -> None:
    path = small_disk / "facts.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(WorkError, match=r"cannot write .*facts.json: No space left on device"):
        artifacts.write_json(path, {"a": "x" * 3 * 2**20})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(small_disk.iterdir()) == [path]


def test_other_errors_of_the_operating_system_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), create(tmp_path / "out", kind="numbers", params={}):
        (tmp_path / "nowhere").read_bytes()
    assert not (tmp_path / "out").exists()


def test_batches_are_all_rows_in_order_in_bounded_tables(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("other", pa.int64(), nullable=False)])
    tables = [pa.table({"id": range(start, start + 5000), "other": range(5000)}, schema) for start in (0, 5000)]
    with artifacts.create(tmp_path / "out", kind="numbers", params={}) as out:
        out.write_parts(tables, schema)
    batches = list(artifacts.open_artifact(tmp_path / "out", "numbers").batches(["id"], 3000))
    assert max(batch.num_rows for batch in batches) == 3000
    assert pa.concat_tables(batches)["id"].to_pylist() == list(range(10_000))
    assert all(batch.column_names == ["id"] for batch in batches)
