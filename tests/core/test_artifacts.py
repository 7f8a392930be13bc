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
            out.write_parts(parts, table(1).schema)
    assert open_artifact(tmp_path / "many", "numbers").read().column("value").to_pylist() == [2, 1]
    assert open_artifact(tmp_path / "none", "numbers").read().num_rows == 0
    assert [path.name for path in open_artifact(tmp_path / "none", "numbers").tables()] == ["part-00000.parquet"]


@pytest.mark.parametrize("size", [100, 4096, 9500])
def test_parts_of_so_many_rows_have_the_bytes_of_whole_tables(tmp_path: Path, size: int) -> None:
    whole = table(*range(9500))
    with create(tmp_path / "whole", kind="numbers", params={}) as out:
        out.write_table("part-00000.parquet", whole.slice(0, 5000))
        out.write_table("part-00001.parquet", whole.slice(5000))
    pieces = [whole.slice(start, size) for start in range(0, whole.num_rows, size)]
    with create(tmp_path / "cut", kind="numbers", params={}) as out:
        out.write_parts([whole.slice(0, 0), *pieces], whole.schema, rows=5000)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "cut")


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


def test_a_flip_cannot_make_an_older_format_of_a_manifest(tmp_path: Path) -> None:
    manifest = make(tmp_path / "out", 1).path / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"format_version": 2', b'"format_version": 1'))
    with pytest.raises(ArtifactError, match="its sha256 is another"):
        read_manifest(tmp_path / "out")


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.tmp-killed"
    leftover.mkdir()
    (leftover / "a.parquet").write_bytes(b"half")
    make(tmp_path / "out", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NO_EXCHANGE = "folders._exchange = lambda *_: False\n"


def run_killed(target: Path, point: str, before: str = "") -> None:
    """Write 2 into the artifact in a process that dies at the point."""
    code = f"import pathlib; from pipeline.core import folders\n{before}"
    code += f"from tests.core.test_artifacts import make; make(pathlib.Path({str(target)!r}), 2)"
    environment = os.environ | {fault_points.VARIABLE: f"{point}:1"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == -signal.SIGKILL


def test_a_killed_write_leaves_the_old_artifact_and_the_next_one_is_clean(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    run_killed(tmp_path / "out", "artifact.commit")
    assert open_artifact(tmp_path / "out", "numbers").read()["value"].to_pylist() == [1]
    assert make(tmp_path / "out", 2).read()["value"].to_pylist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_an_artifact_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    run_killed(tmp_path / "out", "artifact.swap", before=NO_EXCHANGE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="boom"), create(tmp_path / "out", kind="numbers", params={}):
        raise RuntimeError("boom")
    assert open_artifact(tmp_path / "out", "numbers").read()["value"].to_pylist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_leaves_alone_what_another_one_is_writing(tmp_path: Path) -> None:
    with create(tmp_path / "out", kind="numbers", params={}) as slow:
        slow.write_table("a.parquet", table(1))
        code = "import sys, pathlib; from tests.core.test_artifacts import make; make(pathlib.Path(sys.argv[1]), 2)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, check=True)
        assert open_artifact(tmp_path / "out", "numbers").read()["value"].to_pylist() == [2]
    assert open_artifact(tmp_path / "out", "numbers").read()["value"].to_pylist() == [1]
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
        out.write_parts([table(1), table(2)], table(1).schema)
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
    with pytest.raises(ArtifactError, match="format version 99, this code reads 2"):
        read_manifest(tmp_path / "out")


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    make(tmp_path / "out", 1, sources={"data/a.txt": "0" * 64})
    path = tmp_path / "out" / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ArtifactError):
            read_manifest(tmp_path / "out")
    path.write_bytes(whole)
    assert read_manifest(tmp_path / "out").manifest.sources == {"data/a.txt": "0" * 64}


def test_a_manifest_of_format_1_is_read(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text()) | {"format_version": 1}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in ("sources", "sha256")}))
    assert open_artifact(tmp_path / "out", "numbers").manifest.sources == {}


def test_keys_that_are_numbers_keep_the_manifest_s_own_digest(tmp_path: Path) -> None:
    with create(tmp_path / "out", kind="numbers", params={"by_length": {9: 1, 10: 2}}):
        pass
    assert read_manifest(tmp_path / "out").manifest.params == {"by_length": {"9": 1, "10": 2}}


def test_a_full_disk_is_a_work_error_and_leaves_the_target_as_it_was(small_disk: Path) -> None:
    make(small_disk / "out", 1)
    before = snapshot(small_disk)
    noise = pa.table({"id": ["a"], "value": pa.array([os.urandom(3 * 2**20)], pa.binary())})
    message = "cannot write .*/out: No space left on device"
    with pytest.raises(WorkError, match=message), create(small_disk / "out", kind="numbers", params={}) as out:
        out.write_table("a.parquet", noise)
    assert snapshot(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_full_disk_under_weights(small_disk: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    with pytest.raises(WorkError, match=r"out: No space left"), create(small_disk / "out", kind="m", params={}) as out:
        save_file({"a": np.zeros(2**19)}, out.path / "a.safetensors")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("blocking", ["data", "data/out"])
def test_a_file_where_a_folder_is_needed(workspace: Path, blocking: str) -> None:
    Path(blocking).parent.mkdir(exist_ok=True)
    Path(blocking).write_text("mine")
    message = f"^{blocking} is a file, where a folder is needed"
    with pytest.raises(WorkError, match=message), create(Path("data/out"), kind="numbers", params={}):
        pass
    assert Path(blocking).read_text() == "mine"
    with pytest.raises(ArtifactError, match=r"data/out"):
        open_artifact(Path("data/out"), "numbers")


def test_an_input_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", 1)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(artifacts, "file_sha256", refuse)
    with pytest.raises(ArtifactError, match=r"out/a\.parquet: cannot be read: Permission denied"):
        open_artifact(tmp_path / "out", "numbers")


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
