"""ShardStore: finished rows survive anything, unfinished ones are computed again, the result does not show it."""

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core import fault_points
from pipeline.core import row_store as shards
from pipeline.core.errors import WorkError
from pipeline.core.files import write_parquet
from pipeline.core.row_store import ShardStore
from tests.conftest import ROOT

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("value", pa.int64(), nullable=False)])
FINGERPRINT = {"model": "m", "version": 1}


def ids(count: int) -> list[str]:
    return [f"{index * 7919 % 100003:06d}" for index in range(count)]


def row(row_id: str) -> dict[str, object]:
    return {"id": row_id, "value": int(row_id) ** 2}


def store(root: Path, *, flush_rows: int = 10, **fingerprint: object) -> ShardStore:
    return ShardStore(root, SCHEMA, FINGERPRINT | fingerprint, flush_rows=flush_rows, flush_seconds=3600)


def fill(root: Path, row_ids: Iterable[str], *, flush_rows: int = 10) -> list[str]:
    """Compute what is missing, as a stage does; returns the ids that were computed."""
    with store(root, flush_rows=flush_rows) as work:
        wanted = list(row_ids)
        finished = work.committed(wanted)
        missing = [row_id for row_id in wanted if row_id not in finished]
        for row_id in missing:
            work.add(row(row_id))
    return missing


def sorted_tables(work: ShardStore, row_ids: list[str], rows_per_table: int) -> list[pa.Table]:
    ordered = sorted(row_ids)
    return [work.take(ordered[start : start + rows_per_table]) for start in range(0, len(ordered), rows_per_table)]


def table_bytes(root: Path, row_ids: list[str], rows_per_table: int = 37) -> list[bytes]:
    result = []
    with store(root) as work:
        for table in sorted_tables(work, row_ids, rows_per_table):
            sink = pa.BufferOutputStream()
            write_parquet(table, sink)
            result.append(sink.getvalue().to_pybytes())
    return result


def shard_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.parquet"))


def test_rows_come_back_sorted_in_tables_of_bounded_size(tmp_path: Path) -> None:
    wanted = ids(95)
    fill(tmp_path, wanted)
    with store(tmp_path) as work:
        tables = sorted_tables(work, wanted, 40)
        assert len(work) == 95
    assert [table.num_rows for table in tables] == [40, 40, 15]
    assert pa.concat_tables(tables).to_pylist() == [row(row_id) for row_id in sorted(wanted)]
    assert all(table.schema == SCHEMA for table in tables)


def test_only_the_rows_asked_for_come_back(tmp_path: Path) -> None:
    fill(tmp_path, ids(50))
    with store(tmp_path) as work:
        table = work.take(sorted(ids(50)[:5]))
        assert table.column("id").to_pylist() == sorted(ids(50)[:5])
        with pytest.raises(KeyError, match="not there"):
            work.take([ids(50)[0], "not there"])


def test_rows_can_be_taken_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    fill(tmp_path, ids(50))
    wanted = [ids(50)[index] for index in (7, 3, 7, 49)]
    with store(tmp_path) as work:
        assert work.take(wanted).to_pylist() == [row(row_id) for row_id in wanted]
        assert work.take([]).equals(SCHEMA.empty_table())


def test_what_is_committed_is_told_for_many_at_once(tmp_path: Path) -> None:
    fill(tmp_path, ids(50), flush_rows=5)
    with store(tmp_path, flush_rows=100) as work:
        work.add(row(ids(51)[50]))
        assert work.committed(ids(60)) == set(ids(50))  # the pending row is not on the disk
        assert work.committed([*ids(3), "not there"]) == set(ids(3))
        assert work.committed([]) == set()
        assert sorted(work) == sorted(ids(50))


def test_only_shards_of_the_range_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = sorted(ids(50))
    fill(tmp_path, ordered, flush_rows=10)  # five shards that follow one another
    read: list[Path] = []
    plain = shards.pq.read_table

    def reading(path: Path, **settings: object) -> pa.Table:
        read.append(path)
        return plain(path, **settings)

    monkeypatch.setattr(shards.pq, "read_table", reading)
    with store(tmp_path) as work:
        assert work.committed(ordered[12:15]) == set(ordered[12:15])
        assert read == shard_files(tmp_path)[1:2]
        read.clear()
        assert work.take(ordered[18:22])["id"].to_pylist() == ordered[18:22]
        assert sorted(read) == shard_files(tmp_path)[1:3]


def test_whole_tables_count_like_rows(tmp_path: Path) -> None:
    with store(tmp_path, flush_rows=10) as work:
        work.add(row(ids(9)[8]))
        work.add_table(pa.Table.from_pylist([row(row_id) for row_id in ids(8)], schema=SCHEMA))
        assert len(work) == 9
        assert not shard_files(tmp_path)
        work.add_table(pa.Table.from_pylist([row(ids(10)[9])], schema=SCHEMA))
        assert len(shard_files(tmp_path)) == 1
    assert fill(tmp_path, ids(10)) == []


def test_a_shard_is_sorted_in_row_groups_that_a_range_can_skip(tmp_path: Path) -> None:
    fill(tmp_path, ids(9000), flush_rows=9000)
    metadata = pa.parquet.read_metadata(shard_files(tmp_path)[0])
    spans = [metadata.row_group(index).column(0).statistics for index in range(metadata.num_row_groups)]
    assert len(spans) == 3
    assert all(before.max < after.min for before, after in itertools.pairwise(spans))


def test_a_second_run_computes_nothing_and_a_grown_corpus_only_its_new_rows(tmp_path: Path) -> None:
    assert len(fill(tmp_path, ids(40))) == 40
    assert fill(tmp_path, ids(40)) == []
    assert fill(tmp_path, ids(55)) == ids(55)[40:]


def test_rows_are_on_the_disk_when_the_block_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), store(tmp_path, flush_rows=1000) as work:
        for row_id in ids(3):
            work.add(row(row_id))
        raise KeyboardInterrupt
    assert fill(tmp_path, ids(3)) == []


def test_rows_reach_the_disk_after_the_flush_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ShardStore(tmp_path, SCHEMA, FINGERPRINT, flush_rows=1000, flush_seconds=10) as work:
        work.add(row("1"))
        assert "1" not in work
        now[0] = 10.0
        work.add(row("2"))
        assert "1" in work
        assert "2" in work


def test_a_burst_reaches_the_disk_without_another_row(tmp_path: Path) -> None:
    with ShardStore(tmp_path, SCHEMA, FINGERPRINT, flush_rows=1000, flush_seconds=0.1) as work:
        for row_id in ids(16):
            work.add(row(row_id))
        deadline = time.monotonic() + 60
        while sum(pa.parquet.read_metadata(file).num_rows for file in shard_files(tmp_path)) < 16:
            assert time.monotonic() < deadline, "the rows stay in memory"
            time.sleep(0.02)
        assert len(work) == 16


def test_another_fingerprint_or_schema_never_sees_old_rows(tmp_path: Path) -> None:
    fill(tmp_path, ids(10))
    with store(tmp_path, version=2) as other:
        assert len(other) == 0
    wider = SCHEMA.append(pa.field("extra", pa.int8()))
    with ShardStore(tmp_path, wider, FINGERPRINT) as other:
        assert len(other) == 0
    with store(tmp_path) as same:
        assert len(same) == 10


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


@pytest.mark.parametrize("damage", [truncate, flip, lambda content: b""], ids=["torn", "flipped byte", "empty"])
def test_a_damaged_shard_is_computed_again_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    fill(tmp_path / "clean", ids(40))
    fill(tmp_path / "hurt", ids(40))
    victim = shard_files(tmp_path / "hurt")[1]
    victim.write_bytes(damage(victim.read_bytes()))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert fill(tmp_path / "hurt", ids(40)) == ids(40)[10:20]
    assert f"{victim} is damaged (torn write or changed bytes): its rows are computed again" in caplog.text
    assert table_bytes(tmp_path / "hurt", ids(40)) == table_bytes(tmp_path / "clean", ids(40))


def test_a_half_written_temporary_file_is_no_shard(tmp_path: Path) -> None:
    fill(tmp_path, ids(10))
    leftover = shard_files(tmp_path)[0].parent / ".00000001-abc.parquet.xyz"
    leftover.write_bytes(b"half")
    assert fill(tmp_path, ids(10)) == []
    assert not leftover.exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, ids(10))
    stranger = shard_files(tmp_path)[0].parent / "notes.parquet"
    stranger.write_bytes(b"mine")
    assert fill(tmp_path, ids(10)) == []
    assert stranger.read_bytes() == b"mine"


# --- compaction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty shards of five rows, more than what the store keeps."""
    fill(tmp_path, ids(200), flush_rows=5)
    assert len(shard_files(tmp_path)) == 40
    monkeypatch.setattr(shards, "COMPACT_ABOVE", 8)
    return tmp_path


def test_many_small_shards_become_one(many_shards: Path) -> None:
    before = table_bytes_without_compaction(many_shards)
    assert fill(many_shards, ids(200)) == []
    assert len(shard_files(many_shards)) == 1
    assert table_bytes(many_shards, ids(200)) == before


def test_shards_are_merged_while_rows_are_added(many_shards: Path) -> None:
    fill(many_shards / "other", ids(200), flush_rows=1)
    assert len(shard_files(many_shards / "other")) <= 9
    assert table_bytes(many_shards / "other", ids(200)) == table_bytes(many_shards, ids(200))


def test_groups_stay_below_the_bound_and_large_shards_are_left(
    many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    assert fill(many_shards, ids(200)) == []
    files = shard_files(many_shards)
    assert 1 < len(files) < 20
    assert all(shards._Shard.of(file).size <= 1000 for file in files)
    monkeypatch.setattr(shards, "COMPACT_ABOVE", 1)
    kept = {file for file in files if shards._Shard.of(file).size >= 500}
    assert fill(many_shards, ids(200)) == []
    assert kept
    assert kept <= set(shard_files(many_shards))


def test_a_crash_in_the_middle_of_compaction_loses_nothing(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table_bytes_without_compaction(many_shards)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    unlink, removed = Path.unlink, []

    def crash(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == 7:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", crash)
        store(many_shards)
    assert len(removed) == 7
    assert sum(pa.parquet.read_metadata(file).num_rows for file in shard_files(many_shards)) > 200
    assert fill(many_shards, ids(200)) == []
    assert table_bytes(many_shards, ids(200)) == before


def test_a_full_disk_during_compaction_loses_nothing(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WorkError, match="No space left on device"):
        patch.setattr(shards, "write_bytes", full)
        store(many_shards)
    assert fill(many_shards, ids(200)) == []


def table_bytes_without_compaction(root: Path) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "COMPACT_ABOVE", 10**6)
        return table_bytes(root, ids(200))


# --- other processes ------------------------------------------------------------------------------------------------

FLUSH_ROWS = 7
WRITER = """
import sys, time
from pathlib import Path
from tests.core import test_row_store as t
root, log, delay = Path(sys.argv[1]), open(sys.argv[2], "a"), float(sys.argv[3])
t.shards.COMPACT_ABOVE = 4
with t.store(root, flush_rows=t.FLUSH_ROWS) as work:
    print("open", flush=True)
    finished = work.committed(t.ids(600))
    for row_id in t.ids(600):
        if row_id not in finished:
            log.write(row_id + "\\n"); log.flush()
            work.add(t.row(row_id))
            time.sleep(delay)
"""


def writer(root: Path, log: Path, *, delay: float = 0.0, kill_at: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), str(log), str(delay)]
    environment = {**os.environ, fault_points.VARIABLE: kill_at}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def wait_until_open(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    process = writer(tmp_path / "work", tmp_path / "log", delay=60)
    wait_until_open(process)
    try:
        with pytest.raises(WorkError, match=rf"is in use by another process \(pid {process.pid}\): wait for it or"):
            store(tmp_path / "work")
    finally:
        kill(process)
    with store(tmp_path / "work") as work:
        assert len(work) == 0


def test_a_store_that_failed_to_open_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom") as caught:
        patch.setattr(ShardStore, "_load", lambda self: (_ for _ in ()).throw(RuntimeError("boom")))
        store(tmp_path)
    with store(tmp_path) as work:
        assert len(work) == 0
    assert caught.tb is not None  # the failed store is still referenced: its lock was released, not collected


KILLS = (
    "row_store.commit:1",
    "file.rename:3",  # the first is that of fingerprint.json
    "row_store.committed:2",
    "row_store.merge:1",
    "row_store.commit:5",
)


@pytest.mark.parametrize("kills", [KILLS, pytest.param(KILLS * 4, marks=pytest.mark.slow)], ids=["5 kills", "20 kills"])
def test_killed_at_any_point_the_result_is_byte_equal(tmp_path: Path, kills: tuple[str, ...]) -> None:
    fill(tmp_path / "clean", ids(600))
    work, log = tmp_path / "work", tmp_path / "log"
    for point in kills:
        process = writer(work, log, kill_at=point)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, point
    last = writer(work, log)
    last.communicate(timeout=240)
    assert last.returncode == 0
    assert table_bytes(work, ids(600)) == table_bytes(tmp_path / "clean", ids(600))
    computed = log.read_text().split()
    assert set(computed) == set(ids(600))
    # A kill loses at most the rows of one unwritten shard.
    assert len(computed) - len(set(computed)) <= FLUSH_ROWS * len(kills)


def test_a_disk_that_refuses_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise WorkError("no space")

    monkeypatch.setattr(shards, "write_bytes", full)
    monkeypatch.setattr(shards, "write_json", lambda *_: None)
    with store(tmp_path, flush_rows=1) as known, pytest.raises(WorkError, match="no space"):
        known.add(row("000001"))  # and not again when the store is closed
    unknown = store(tmp_path)
    with pytest.raises(WorkError, match="no space"), unknown:
        unknown.add(row("000001"))


def test_a_full_disk_keeps_what_was_committed(small_disk: Path) -> None:
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("value", pa.binary(), nullable=False)])

    def fill_up() -> None:
        with ShardStore(small_disk, schema, FINGERPRINT, flush_rows=2) as work:
            for row_id in ids(40):
                work.add({"id": row_id, "value": random.Random(row_id).randbytes(100_000)})

    with pytest.raises(WorkError, match=r"cannot write .*: No space left on device. Finished work is kept"):
        fill_up()
    assert not [path for path in small_disk.rglob(".*") if path.is_file()]
    with ShardStore(small_disk, schema, FINGERPRINT, flush_rows=2) as work:
        kept = len(work)
        assert 4 <= kept < 12
        assert all(row_id in work for row_id in ids(40)[:kept])
