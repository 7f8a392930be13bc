"""Attacks on whole stages: death and full disks at each change of the disk, random kills, two at once, the clock."""

import gc
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.fault_campaign import workspace
from bench.fault_campaign.disk import Disk, Fault
from bench.fault_campaign.processes import Child, Ended, Journal, run
from bench.fault_campaign.snapshots import Snapshots, read_states
from bench.fault_campaign.tally import Tally

SEED = 0


@dataclass
class Arena:
    """A workspace before and after each stage, and a place for disturbed copies.

    Attributes:
        before: the workspace that a stage finds, by stage.
        finished: the workspace after all stages.
        changes: how often a stage changes the disk.
        seconds: how long a stage takes undisturbed.
    """

    folder: Path
    tally: Tally
    before: dict[str, Path] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.scratch = self.folder / "log.txt", self.folder / "scratch"
        self.finished = self.folder / "finished"
        self.journal = Journal(self.folder / "journal.txt")

    def prepare(self, stages: Iterable[str]) -> None:
        """Run the stages once, undisturbed; they are the first ones of the pipeline.

        Raises:
            RuntimeError: a stage failed.
        """
        backbone = self.folder / "backbone"
        made = run(lambda: workspace.make_backbone(backbone), self.folder, self.log)
        if made.code:
            raise RuntimeError(made.stderr)
        self.finished.mkdir()
        workspace.make(self.finished, backbone)
        for stage in stages:
            self.before[stage] = self.folder / f"before-{stage}"
            workspace.copy(self.finished, self.before[stage])
            ended = self.run(stage, self.finished)
            if ended.code:
                raise RuntimeError(f"{stage}: {ended.stderr}")
            workspace.import_noted(self.folder / "modules.txt")
        gc.freeze()
        for stage in self.before:  # the first run imported, and the disk knew none of what it imported
            self.fresh(stage)
            started = time.monotonic()
            self.check(stage, f"{stage}, a second time", faults=0)
            self.seconds[stage] = time.monotonic() - started
            self.changes[stage] = int((self.folder / "changes.txt").read_text())

    def run(
        self, stage: str, place: Path, fault: Fault = Fault.NONE, at: int = 0, before: Callable[[], None] | None = None
    ) -> Ended:
        return self.start(stage, place, fault, at, before=before).wait()

    def start(
        self,
        stage: str,
        place: Path,
        fault: Fault = Fault.NONE,
        at: int = 0,
        *,
        log: str = "log.txt",
        before: Callable[[], None] | None = None,
        snapshots: Snapshots | None = None,
    ) -> Child:
        """A process that runs the stage in `place`, after `before`."""

        def work() -> None:
            workspace.prepare_child(self.journal)
            if before is not None:
                before()
            disk = Disk(place, fault, at, snapshots.take if snapshots else None)
            disk.install()
            try:
                workspace.stage(stage)()
            finally:
                (self.folder / "changes.txt").write_text(str(disk.changes))
                if fault == Fault.NONE:
                    workspace.note_imports(self.folder / "modules.txt")
                if snapshots:
                    snapshots.finish()

        return Child(work, place, self.folder / log)

    def check(
        self,
        stage: str,
        where: str,
        *,
        faults: int = 1,
        before: Callable[[], None] | None = None,
        place: Path | None = None,
    ) -> None:
        """Run the stage again in the disturbed copy: it ends well, with the bytes of an undisturbed run."""
        disturbed = place or self.scratch
        self.tally.ended(f"{where}, run again", self.run(stage, disturbed, before=before), 0)
        try:
            self.tally.lost(where, workspace.lost_rows(stage, disturbed, self.finished))
        except OSError as error:
            self.tally.lost(f"{where} ({error})", workspace.ROWS)
        self.tally.twice(where, self.journal.repeated() - faults * workspace.INTERVAL)

    def fresh(self, stage: str) -> None:
        workspace.copy(self.before[stage], self.scratch)
        self.journal.clear()


def at_every_change(arena: Arena, stage: str) -> None:
    """What a kill and a power cut at each change of the disk would leave: the stage goes on from there."""
    tally, folder = arena.tally, arena.folder / "states"
    arena.fresh(stage)
    folder.mkdir()
    watched = arena.start(stage, arena.scratch, snapshots=Snapshots(arena.scratch, folder, arena.journal)).wait()
    tally.ended(f"{stage}, watched", watched, 0)
    rows = list(arena.journal)
    for state in read_states(folder):
        tally.stops += state.stops
        tally.states += 1
        arena.journal.keep(rows[: state.rows])
        arena.check(stage, f"{stage}, {state.kind} at change {state.first}", place=Path(state.folder))
    shutil.rmtree(folder)


def at_changes(arena: Arena, stage: str, fault: Fault, numbers: Iterable[int]) -> None:
    """The fault at each of these changes of the disk, in a run of its own."""
    tally = arena.tally
    for at in numbers:
        where = f"{stage}, {fault} at change {at} of {arena.changes[stage]}"
        arena.fresh(stage)
        ended = arena.run(stage, arena.scratch, fault, at)
        if fault == Fault.FULL:
            tally.full_disks += 1
            tally.ended(where, ended, 0, 1)
            if ended.code == 1:
                tally.explained(where, ended, "No space left")
        else:
            tally.kills += ended.killed
            tally.power_cuts += ended.killed and fault == Fault.POWER
            tally.ended(where, ended, -9, 0)
        arena.check(stage, where)


def at_random(arena: Arena, stage: str, kills: int) -> None:
    """SIGKILL at random moments, several times in one workspace before the stage may end."""
    draw = random.Random(f"{SEED} {stage}")
    left = kills
    while left > 0:
        arena.fresh(stage)
        died = 0
        for _ in range(min(left, draw.randint(1, 4))):
            ended = arena.start(stage, arena.scratch).kill_after(draw.uniform(0, arena.seconds[stage]))
            arena.tally.ended(f"{stage}, killed at random", ended, -9, 0)
            died += ended.killed
            if not ended.killed:
                break  # it ended before, and what follows would find nothing to do
        left -= died
        arena.tally.kills += died
        arena.check(stage, f"{stage}, {died} random kills", faults=max(1, died))


def two_at_once(arena: Arena, stage: str) -> None:
    """The stage twice at once: one ends well, the other too, or with one line; what they leave is whole."""
    tally = arena.tally
    arena.fresh(stage)
    both = [arena.start(stage, arena.scratch, log=f"log-{number}.txt") for number in range(2)]
    ends = [child.wait() for child in both]
    tally.races += 1
    for ended in ends:
        tally.ended(f"{stage}, two at once", ended, 0, 1)
    if all(ended.code for ended in ends):
        tally.lost(f"{stage}, two at once: neither ended well", 1)
    arena.check(stage, f"{stage}, two at once", faults=workspace.ROWS)  # without a common store both compute


def clock_back(arena: Arena, stage: str) -> None:
    """After a kill the clock goes back by a year, and on while the stage runs: nothing is computed again."""
    arena.fresh(stage)
    ended = arena.run(stage, arena.scratch, Fault.KILL, arena.changes[stage] * 2 // 3)
    arena.tally.kills += ended.killed
    ahead = time.time() + 365 * 24 * 3600
    for path in [arena.scratch, *arena.scratch.rglob("*")]:
        os.utime(path, (ahead, ahead))
    arena.check(stage, f"{stage}, clock back", before=_turn_the_clock_back)


def _turn_the_clock_back() -> None:
    """In a child: each look at the clock finds it an hour earlier."""
    hours = itertools.count()
    now = time.time()
    time.time = lambda: now - 3600 * next(hours)
