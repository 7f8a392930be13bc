"""Attacks on what lies on the disk: flipped bytes and cut files of artifacts, stores and checkpoints, bad inputs."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.fault_campaign import workspace
from bench.fault_campaign.processes import run
from bench.fault_campaign.stages import SEED, Arena
from pipeline.core.files import digest_of

PHASE = "finished"  # the folder of a phase of `teach`


def damage_artifacts(arena: Arena, *, flips: int, truncations: int) -> None:
    """Change random bytes, and cut files at random places: the audit must have a finding each time."""
    workspace.copy(arena.finished, arena.scratch)
    places = [arena.scratch / name for stage, name in workspace.OUTPUTS.items() if stage != "report"]
    files = [file for place in places for file in sorted(place.rglob("*")) if file.is_file() and file.stat().st_size]
    _damage(arena, files, _audit_finds, "artifacts", flips=flips, truncations=truncations)


def damage_stores(arena: Arena, *, flips: int, truncations: int) -> None:
    """The same with shards of row stores, checkpoints and finished scores: they are not used."""
    workspace.copy(arena.finished, arena.scratch)
    found = sorted((arena.scratch / ".work").rglob("*"))
    schemas = {path: pq.read_schema(path) for path in found if path.suffix == ".parquet"}
    # The schema of a store is not always what its shards give back, and its folder's name has a hash of it.
    schemas = {path: schema for path, schema in schemas.items() if _store_name(path, schema) == path.parent.name}
    checkpoints = [path for path in found if path.name == "checkpoint"]
    phases = [path for path in found if path.is_file() and PHASE in path.parts]
    kinds: dict[str, tuple[list[Path], Callable[[Path], bool]]] = {
        "shards": (sorted(schemas), lambda shard: _shard_noticed(shard, schemas[shard])),
        "checkpoints": (checkpoints, _checkpoint_noticed),
        "phases of teach": (phases, _phase_noticed),
    }
    for what, (files, notices) in kinds.items():
        if files:
            _damage(arena, files, notices, what, flips=flips // len(kinds), truncations=truncations // len(kinds))


def _damage(
    arena: Arena,
    files: list[Path],
    notices: Callable[[Path], bool],
    where: str,
    *,
    flips: int,
    truncations: int,
) -> None:
    answers = arena.folder / "answers.txt"

    def work() -> None:
        draw = random.Random(f"{SEED} {where}")
        with answers.open("w") as out:
            out.write(json.dumps(["sound", f"undamaged {where}", notices(files[0])]) + "\n")
            for kind in [*["flip"] * flips, *["cut"] * truncations]:
                # By size, so that each byte is as likely as any other; a cut takes each file as often.
                weights = [file.stat().st_size if kind == "flip" else 1 for file in files]
                [file] = draw.choices(files, weights)
                with _damaged(file, kind, draw) as what:
                    out.write(json.dumps([kind, f"{file.relative_to(arena.scratch)}: {what}", notices(file)]) + "\n")

    arena.tally.ended(f"damage to {where}", run(work, arena.scratch, arena.log), 0)
    for kind, what, noticed in map(json.loads, answers.read_text().splitlines()):
        if kind == "sound":
            arena.tally.lost(what, int(noticed))  # a detector that always fires detects nothing
            continue
        if kind == "flip":
            arena.tally.flips += 1
            arena.tally.flips_unnoticed += not noticed
        else:
            arena.tally.truncations += 1
            arena.tally.truncations_unnoticed += not noticed
        if not noticed:
            arena.tally.note(f"unnoticed: {what}")


@contextmanager
def _damaged(file: Path, kind: str, draw: random.Random) -> Iterator[str]:
    before = file.read_bytes()
    at = draw.randrange(len(before))
    byte = before[at] ^ draw.randrange(1, 256)
    changed = before[:at] + bytes([byte]) + before[at + 1 :] if kind == "flip" else before[:at]
    file.write_bytes(changed)
    try:
        yield f"byte {at} is {byte}" if kind == "flip" else f"cut to {at} bytes"
    finally:
        file.write_bytes(before)


def _audit_finds(_: Path) -> bool:
    from pipeline.audit import audit

    return bool(audit(Path()).findings)


def _store_name(shard: Path, schema: pa.Schema) -> str:
    fingerprint = json.loads((shard.parent / "fingerprint.json").read_text())
    return digest_of({**fingerprint, "schema": str(schema)})[:16]


def _shard_noticed(shard: Path, schema: pa.Schema) -> bool:
    """Whether the store that the shard belongs to opens without it, and removes it."""
    from pipeline.core.row_store import ShardStore

    fingerprint = json.loads((shard.parent / "fingerprint.json").read_text())
    with ShardStore(shard.parent.parent, schema, fingerprint) as store:
        return store.path == shard.parent and not shard.exists()


def _phase_noticed(file: Path) -> bool:
    from pipeline.teach.recipe import is_whole

    return not is_whole(next(folder for folder in file.parents if folder.name == PHASE))


def _checkpoint_noticed(checkpoint: Path) -> bool:
    from pipeline.optim.checkpoint import read_checkpoint

    return read_checkpoint(checkpoint) is None
