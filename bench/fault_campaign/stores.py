"""Attacks on artifact and store code alone: small workloads in which every change of the disk can be the last."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from bench.fault_campaign.disk import Disk, Fault
from bench.fault_campaign.processes import Child, Journal, run
from bench.fault_campaign.tally import Tally
from bench.fault_campaign.workspace import copy
from pipeline.core import artifacts, folders, row_store
from pipeline.core.part_store import open_parts, whole_file
from pipeline.core.row_store import ShardStore
from pipeline.core.run import user_errors

ROWS, INTERVAL = 24, 3
SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("value", pa.int64())])


@dataclass(frozen=True)
class Workload:
    """Work on one kind of storage in the current folder.

    Attributes:
        prepare: makes what lies there before.
        work: changes it; run again after a fault, it ends in the same state.
        rows: how many rows lie there as they must; ROWS when all is well. Called after a fault too.
    """

    name: str
    prepare: Callable[[], None]
    work: Callable[[Journal], None]
    rows: Callable[[], int]
    rows_at_any_time: bool = False


def _do_nothing() -> None:
    pass


def _table(first: int = 0) -> pa.Table:
    ids = [f"{index:04d}" for index in range(ROWS)]
    return pa.table({"id": ids, "value": [first + index for index in range(ROWS)]}, SCHEMA)


def _fill_store(journal: Journal) -> None:
    row_store.COMPACT_ABOVE = 3
    store = row_store.ShardStore(Path("store"), SCHEMA, {}, flush_rows=INTERVAL, flush_seconds=3600.0)
    with store:
        finished = store.committed(_table()["id"].to_pylist())
        for row in _table().to_pylist():
            if row["id"] not in finished:
                journal.add([row["id"]])
                store.add(row)


def _stored_rows() -> int:
    with ShardStore(Path("store"), SCHEMA, {}) as store:
        wanted = {row["id"]: row for row in _table().to_pylist()}
        finished = store.committed(wanted)
        return sum(store.take([row_id]).to_pylist() == [wanted[row_id]] for row_id in finished)


def _write_artifact(first: int, *, exchange: bool = True) -> None:
    if not exchange:
        folders._exchange = lambda one, other: False
    with artifacts.create(Path("data/out"), kind="numbers", params={"first": first}) as out:
        out.write_parts([_table(first).slice(0, 10), _table(first).slice(10)], SCHEMA)
        (out.path / "notes.txt").write_text("a file that is no table")


def _artifact_rows() -> int:
    """All rows, if the artifact is whole: the old one, which begins at 100, or the new one."""
    made = artifacts.open_artifact(Path("data/out"), "numbers")
    first = made.manifest.params["first"]
    return ROWS if first in (100, 200) and made.read().equals(_table(first)) else 0


def _recovered_rows() -> int:
    """As `_artifact_rows`, where no exchange exists: between its two renames the old artifact is beside its place."""
    folders._recover(Path("data/out"))
    return _artifact_rows()


def _put_parts(journal: Journal) -> None:

    if Path("whole.bin").exists():
        return
    with open_parts("parts", {"of": "numbers"}, ".bin") as parts, whole_file(Path("whole.bin")) as place:
        content = b""
        for index in range(ROWS):
            found = parts.find(index, index)
            if found is None:
                journal.add([str(index)])
                found = parts.put(index, index, index.to_bytes(4))
            content += found.read_bytes()
        place.write_bytes(content)


def _part_rows() -> int:
    whole = Path("whole.bin")
    if not whole.exists():
        return ROWS  # not there yet, and never half
    return ROWS * (whole.read_bytes() == b"".join(index.to_bytes(4) for index in range(ROWS)))


def _save_checkpoints(_: Journal) -> None:
    import torch

    from pipeline.optim.checkpoint import save_checkpoint

    trained = {"w": torch.nn.Parameter(torch.arange(float(ROWS)))}
    for step in range(4):
        save_checkpoint(Path("work/checkpoint"), trained, torch.optim.AdamW(trained.values()), {"curve": [0.0] * step})


def _checkpoint_rows() -> int:
    from pipeline.optim.checkpoint import read_checkpoint

    found = read_checkpoint(Path("work/checkpoint"))
    return ROWS if found is None and not Path("work/checkpoint").exists() else len(found.tensors["trained.w"])  # type: ignore[union-attr]


WORKLOADS = (
    Workload("row store", _do_nothing, _fill_store, _stored_rows),
    Workload("artifact", partial(_write_artifact, 100), lambda _: _write_artifact(200), _artifact_rows, True),
    Workload(
        "artifact without exchange",
        partial(_write_artifact, 100),
        lambda _: _write_artifact(200, exchange=False),
        _recovered_rows,
        True,
    ),
    Workload("part store", _do_nothing, _put_parts, _part_rows, True),
)
# Apart: torch makes a process large, and a large process forks slowly.
CHECKPOINT = Workload("checkpoint", _do_nothing, _save_checkpoints, _checkpoint_rows, True)


class StoreArena:
    """A place for the workloads."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tally, self._folder, self._log = tally, folder, folder / "log.txt"
        self._before, self._scratch = folder / "before", folder / "scratch"
        self._journal = Journal(folder / "journal.txt")
        self._draw = random.Random(0)

    def attack(self, workload: Workload, *, every: int, random_kills: int) -> None:
        """Each fault at every n-th change, then kills at random moments, again and again until the work is done."""
        copy(self._nothing(), self._before)
        self.tally.ended(f"{workload.name}, prepare", run(workload.prepare, self._before, self._log), 0)
        changes, seconds = self._count(workload)
        for fault in (Fault.KILL, Fault.POWER, Fault.FULL):
            for at in range(1, changes + 1, every):
                self._at_change(workload, fault, at, changes)
        self._at_random(workload, random_kills, seconds)

    def _nothing(self) -> Path:
        empty = self._folder / "nothing"
        empty.mkdir(exist_ok=True)
        return empty

    def _count(self, workload: Workload) -> tuple[int, float]:
        copy(self._before, self._scratch)
        counted = self._folder / "changes.txt"

        def work() -> None:
            disk = Disk(self._scratch)
            disk.install()
            workload.work(self._journal)
            counted.write_text(str(disk.changes))

        started = time.monotonic()
        self.tally.ended(workload.name, run(work, self._scratch, self._log), 0)
        return int(counted.read_text()), time.monotonic() - started

    def _at_change(self, workload: Workload, fault: Fault, at: int, changes: int) -> None:
        where = f"{workload.name}, {fault} at change {at} of {changes}"
        copy(self._before, self._scratch)
        self._journal.clear()

        def work() -> None:
            Disk(self._scratch, fault, at).install()
            _in_one_line(lambda: workload.work(self._journal))

        ended = run(work, self._scratch, self._log)
        self.tally.kills += ended.killed
        self.tally.power_cuts += ended.killed and fault == Fault.POWER
        self.tally.full_disks += fault == Fault.FULL
        self.tally.ended(where, ended, *((0, 1) if fault == Fault.FULL else (-9,)))
        if workload.rows_at_any_time:
            self._check(workload, where)
        self._finish(workload, where, faults=1)

    def _finish(self, workload: Workload, where: str, *, faults: int) -> None:
        self._check(workload, f"{where}, run again", before=lambda: workload.work(self._journal))
        self.tally.twice(where, self._journal.repeated() - faults * INTERVAL)

    def _check(self, workload: Workload, where: str, before: Callable[[], None] = _do_nothing) -> None:
        def check() -> None:
            before()
            print("rows", workload.rows())

        ended = run(check, self._scratch, self._log)
        self.tally.ended(where, ended, 0)
        found = ended.stderr.rpartition("rows ")[2].strip()
        self.tally.lost(where, ROWS - int(found) if found.isdigit() else ROWS)

    def _at_random(self, workload: Workload, kills: int, seconds: float) -> None:
        left = kills
        while left > 0:
            copy(self._before, self._scratch)
            self._journal.clear()
            died = 0
            for _ in range(min(left, self._draw.randint(1, 6))):
                child = Child(lambda: workload.work(self._journal), self._scratch, self._log)
                died += child.kill_after(self._draw.uniform(0, seconds)).killed
            left -= died
            self.tally.kills += died
            self._finish(workload, f"{workload.name}, {died} random kills", faults=max(1, died))

    def race(self, rounds: int) -> None:
        """Two writers of one artifact at once, and two of one store."""
        for number in range(rounds):
            copy(self._nothing(), self._scratch)
            first = Child(partial(_write_artifact, 100), self._scratch, self._folder / "a.txt")
            second = Child(partial(_write_artifact, 200), self._scratch, self._folder / "b.txt")
            for ended in (first.wait(), second.wait()):
                self.tally.ended(f"race {number} of two artifacts", ended, 0)
            self._check(WORKLOADS[1], f"race {number} of two artifacts")
            leftovers = [path.name for path in (self._scratch / "data").iterdir() if path.name != "out"]
            if leftovers:
                self.tally.note(f"race {number} of two artifacts leaves {leftovers}")
            stores = [
                Child(lambda: _in_one_line(lambda: _fill_store(self._journal)), self._scratch, self._folder / log)
                for log in ("a.txt", "b.txt")
            ]
            codes = []
            for ended in [child.wait() for child in stores]:
                self.tally.ended(f"race {number} of two stores", ended, 0, 1)
                codes.append(ended.code)
            if 0 not in codes:
                self.tally.lost(f"race {number} of two stores: neither wrote", 1)
            self._check(WORKLOADS[0], f"race {number} of two stores")
            self.tally.races += 2


def _in_one_line(work: Callable[[], None]) -> None:

    with user_errors():
        work()
