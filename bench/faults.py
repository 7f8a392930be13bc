"""Faults: stages and stores are killed, cut off from disk and power, and given damaged files, and must lose nothing.

    python bench/faults.py            every change of the disk, 1,000 kills, 1,000 flips; hours, not run whole yet
    python bench/faults.py --short    a sample, of the stores and the first stages, in a minute or two

Every stage runs on tiny random models with the echo engine and the hash teacher; a run after a fault must end in the
bytes of an undisturbed one. Processes are forked, which needs Linux. What the counts mean: `fault_campaign/tally.py`.
A kill may cost the rows since the last commit (one interval, 4 rows here); more are `rows_computed_twice`.

Ctrl-C prints what was counted so far.

Not modelled: a disk that loses a rename after the folder was synced, or reorders what was synced.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# One thread each: a thread pool does not survive a fork, and nobody waits for a core.
os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.update({"HF_HUB_OFFLINE": "1", "PIPELINE_DEVICE": "cpu"})
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fault_campaign import damage, stages, stores, workspace
from bench.fault_campaign.disk import Fault
from bench.fault_campaign.tally import Tally

# The short form attacks these stages alone: the others take seconds a run.
QUICK = ("collect", "generate", "embed")
FAULTS = (Fault.KILL, Fault.POWER, Fault.FULL)


def main() -> None:
    """Run the campaign; exits with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a sample of every attack")
    parser.add_argument("--kills", type=int, default=1000, help="random kills in all")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bytes of artifacts")
    parser.add_argument("--every", type=int, default=1, help="try every n-th change of the disk in a stage")
    options = parser.parse_args()
    tally = Tally()
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder,
        contextlib.suppress(KeyboardInterrupt),
    ):
        if options.short:
            _short(Path(folder), tally)
        else:
            _full(Path(folder), tally, options)
    for note in tally.notes:
        print(note, file=sys.stderr)
    counts = {key: value for key, value in asdict(tally).items() if key != "notes"}
    print(json.dumps({**counts, "seconds": round(time.monotonic() - started, 1)}))
    sys.exit(bool(tally.broken))


def _full(folder: Path, tally: Tally, options: argparse.Namespace) -> None:
    share = options.kills // 2 // (len(stores.WORKLOADS) + 1)
    _attack_stores(folder, tally, every=1, random_kills=share)
    arena = _prepared(folder, tally, list(workspace.STAGES))
    stores.StoreArena(folder / "stores", tally).attack(stores.CHECKPOINT, every=1, random_kills=share)
    for stage in workspace.STAGES:
        for fault in FAULTS:
            stages.at_changes(arena, stage, fault, range(1, arena.changes[stage] + 1, options.every))
            _say(f"{stage}: {fault} at {arena.changes[stage]} changes", tally)
        stages.at_random(arena, stage, options.kills // 2 // len(workspace.STAGES))
        stages.two_at_once(arena, stage)
        stages.clock_back(arena, stage)
        _say(f"{stage}: done", tally)
    damage.damage_artifacts(arena, flips=options.flips, truncations=options.flips // 10)
    damage.damage_stores(arena, flips=options.flips // 5, truncations=options.flips // 50)
    damage.bad_inputs(arena)


def _short(folder: Path, tally: Tally) -> None:
    _attack_stores(folder, tally, every=32, random_kills=2)
    arena = _prepared(folder, tally, QUICK)
    for stage in QUICK:
        for fault in FAULTS:
            stages.at_changes(arena, stage, fault, [arena.changes[stage] * 3 // 4])
    damage.damage_artifacts(arena, flips=30, truncations=10)
    damage.damage_stores(arena, flips=20, truncations=4)


def _attack_stores(folder: Path, tally: Tally, *, every: int, random_kills: int) -> None:
    arena = stores.StoreArena(folder / "stores", tally)
    for workload in stores.WORKLOADS:
        arena.attack(workload, every=every, random_kills=random_kills)
        _say(f"{workload.name}: done", tally)
    arena.race(max(1, random_kills // 4))


def _prepared(folder: Path, tally: Tally, names: Sequence[str]) -> stages.Arena:
    workspace.import_stages(names)
    gc.freeze()
    arena = stages.Arena(folder / "stages", tally)
    arena.prepare(names)
    _say(", ".join(f"{stage} {count} changes" for stage, count in arena.changes.items()), tally)
    return arena


def _say(what: str, tally: Tally) -> None:
    print(f"{what} ({tally.kills} kills, {tally.broken} broken promises so far)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
