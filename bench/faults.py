"""Faults: stages and stores are killed, cut off from disk and power, and given damaged files, and must lose nothing.

    python bench/faults.py                  every change of the disk, 1,000 random kills, 1,000 flips
    python bench/faults.py --only train     one part: stores, a stage, damage or inputs
    python bench/faults.py --short          a sample, of the stores and the first stages

Every stage runs on tiny random models with the echo engine and the hash teacher; a run after a fault must end in the
bytes of an undisturbed one. Processes are forked, which needs Linux. What the counts mean: `fault_campaign/tally.py`.
Broken promises are printed as they are found.
A kill may cost the rows since the last commit (one interval, 4 rows here); more are `rows_computed_twice`.

Ctrl-C prints what was counted so far.

Not modelled: a disk that loses a rename after the folder was synced, or reorders what was synced.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# One thread each: a thread pool does not survive a fork, and nobody waits for a core. With a wait policy no stage looks
# how busy the machine is, which takes a fifth of a second.
os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"})
os.environ.update({"HF_HUB_OFFLINE": "1", "PIPELINE_DEVICE": "cpu"})
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fault_campaign import damage, inputs, stages, stores, workspace
from bench.fault_campaign.disk import Fault
from bench.fault_campaign.tally import Tally

# The short form attacks these stages alone: the others take seconds a run.
QUICK = ("collect", "generate", "embed")
FAULTS = (Fault.KILL, Fault.POWER, Fault.FULL)
# A stage is killed in earnest at every so many changes of the disk; at all of them a copy is taken.
KILLED_EVERY = 16
PARTS = ("stores", *workspace.STAGES, "damage", "inputs")


def main() -> None:
    """Run the campaign; exits with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a sample of every attack")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--kills", type=int, default=1000, help="random kills in all")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bytes of artifacts")
    parser.add_argument("--every", type=int, default=4, help="fill the disk at every n-th change of a stage")
    options = parser.parse_args()
    tally = Tally()
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="faults-", dir=_memory(), ignore_cleanup_errors=True) as folder,
        contextlib.suppress(KeyboardInterrupt),
    ):
        if options.short:
            _short(Path(folder), tally)
        else:
            _full(Path(folder), tally, options)
    counts = {key: value for key, value in asdict(tally).items() if key != "notes"}
    print(json.dumps({**counts, "seconds": round(time.monotonic() - started, 1)}))
    sys.stdout.flush()
    os._exit(bool(tally.broken))  # libraries that were imported for children alone have much to say at an exit


def _memory() -> str | None:
    """Where an fsync costs nothing, if there is such a place: SIGKILL leaves the same files there."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _full(folder: Path, tally: Tally, options: argparse.Namespace) -> None:
    share = options.kills // 2 // (len(stores.WORKLOADS) + 1)
    if "stores" in options.only:
        _attack_stores(folder, tally, every=1, random_kills=share)
    if {*options.only} == {"stores"}:
        return
    arena = _prepared(folder, tally, _needed(options.only))
    if "stores" in options.only:
        stores.StoreArena(folder / "stores", tally).attack(stores.CHECKPOINT, every=1, random_kills=share)
    for stage in workspace.STAGES:
        if stage in options.only:
            _attack_stage(
                arena, stage, every=options.every, random_kills=-(-options.kills // 2 // len(workspace.STAGES))
            )
    if "damage" in options.only:
        damage.damage_artifacts(arena, flips=options.flips, truncations=options.flips // 10)
        damage.damage_stores(arena, flips=options.flips // 5, truncations=options.flips // 50)
        _say("damage: done", tally)
    if "inputs" in options.only:
        inputs.bad_inputs(arena)
        inputs.awkward_files(arena)
        inputs.readme_commands(arena)
        _say("inputs: done", tally)


def _needed(parts: Sequence[str]) -> list[str]:
    """The stages before and among the parts; damage and inputs need all."""
    names = list(workspace.STAGES)
    if {"damage", "inputs"} & {*parts}:
        return names
    return names[: max((names.index(part) for part in parts if part in names), default=0) + 1]


def _attack_stage(arena: stages.Arena, stage: str, *, every: int, random_kills: int) -> None:
    stages.at_every_change(arena, stage)
    _say(f"{stage}: every change", arena.tally)
    stages.at_changes(arena, stage, Fault.KILL, range(1, arena.changes[stage] + 1, KILLED_EVERY))
    stages.at_changes(arena, stage, Fault.FULL, range(1, arena.changes[stage] + 1, every))
    _say(f"{stage}: full disks", arena.tally)
    stages.at_random(arena, stage, random_kills)
    stages.two_at_once(arena, stage)
    stages.clock_back(arena, stage)
    _say(f"{stage}: done", arena.tally)


def _short(folder: Path, tally: Tally) -> None:
    _attack_stores(folder, tally, every=32, random_kills=2)
    arena = _prepared(folder, tally, QUICK)
    for stage in QUICK:
        for fault in FAULTS:
            stages.at_changes(arena, stage, fault, [arena.changes[stage] * 3 // 4])
        stages.clock_back(arena, stage)
    damage.damage_artifacts(arena, flips=30, truncations=10)
    damage.damage_stores(arena, flips=30, truncations=6)
    inputs.bad_inputs(arena)


def _attack_stores(folder: Path, tally: Tally, *, every: int, random_kills: int) -> None:
    arena = stores.StoreArena(folder / "stores", tally)
    for workload in stores.WORKLOADS:
        arena.attack(workload, every=every, random_kills=random_kills)
        _say(f"{workload.name}: done", tally)
    arena.race(max(1, random_kills // 4))


def _prepared(folder: Path, tally: Tally, names: Sequence[str]) -> stages.Arena:
    arena = stages.Arena(folder / "stages", tally)
    arena.prepare(names)
    _say(
        ", ".join(f"{name} {count} changes in {arena.seconds[name]:.1f} s" for name, count in arena.changes.items()),
        tally,
    )
    return arena


def _say(what: str, tally: Tally) -> None:
    print(f"{what} ({tally.kills} kills, {tally.broken} broken promises so far)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
