"""Attacks on what lies on the disk: flipped bytes and cut files of artifacts, stores and checkpoints, bad inputs."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.fault_campaign import workspace
from bench.fault_campaign.processes import run
from bench.fault_campaign.stages import SEED, Arena
from bench.fault_campaign.tally import Tally
from pipeline.core.artifacts import digest_of


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
    kinds: dict[str, tuple[list[Path], Callable[[Path], bool]]] = {
        "shards": (sorted(schemas), lambda shard: _shard_noticed(shard, schemas[shard])),
        "checkpoints": (checkpoints, _checkpoint_noticed),
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
    bit = 1 << draw.randrange(8)
    changed = before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :] if kind == "flip" else before[:at]
    file.write_bytes(changed)
    try:
        yield f"bit {bit} of byte {at}" if kind == "flip" else f"cut to {at} bytes"
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


def _checkpoint_noticed(checkpoint: Path) -> bool:
    from pipeline.optim.checkpoint import read_checkpoint

    return read_checkpoint(checkpoint) is None


# Of each: what it is, the stage that meets it, and how it comes about in a fresh workspace before that stage.
Change = Callable[[], None]


def _params(change: Callable[[dict[str, object]], None]) -> Change:
    def apply() -> None:
        path = Path("params.yaml")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _write(name: str, content: bytes) -> Change:
    def apply() -> None:
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return apply


def _folder(name: str) -> Change:
    def apply() -> None:
        Path(name).unlink()
        Path(name).mkdir()

    return apply


def _empty_backbone() -> None:
    Path("empty").mkdir()
    _params(lambda content: content.update(backbone={"name": "empty"}))()


_NO_QUERY = b'{"query-id": "q", "corpus-id": "c", "score": 1}\n'
_COMMAND = {"x;touch y": {"local": ["find"]}}

BAD_INPUTS: tuple[tuple[str, str, Change], ...] = (
    ("no params file", "generate", lambda: Path("params.yaml").unlink()),
    ("params that are no YAML", "generate", _write("params.yaml", b"a: [")),
    ("params that are no UTF-8", "generate", _write("params.yaml", b"\xff\xfe")),
    ("params that are a list", "generate", _write("params.yaml", b"[]")),
    ("an unknown key", "generate", _params(lambda content: content.update(generate={"engin": "echo"}))),
    ("an empty source", "collect", _write("data/sources/queries.jsonl", b"")),
    ("a source that is no JSON", "collect", _write("data/sources/queries.jsonl", b"{\n")),
    ("a source that is no UTF-8", "collect", _write("data/sources/queries.jsonl", b'{"text": "\xff"}\n')),
    ("a source with another column", "collect", _write("data/sources/queries.jsonl", b'{"words": "a"}\n')),
    ("a source of numbers", "collect", _write("data/sources/queries.jsonl", b'{"text": 7}\n')),
    ("a folder in place of a source", "collect", _folder("data/sources/queries.jsonl")),
    ("a file in place of local_dir", "collect", _write("data/sources", b"x")),
    ("a file in place of the work folder", "collect", _write(".work", b"x")),
    ("a file in place of results", "generate", _write("results", b"x")),
    ("a file in place of the artifact", "generate", _write("data/responses", b"x")),
    ("a file in place of an input", "generate", _write("data/queries", b"x")),
    ("an input without a manifest", "generate", lambda: Path("data/queries/manifest.json").unlink()),
    ("a manifest that is cut", "generate", _write("data/queries/manifest.json", b'{"kind": ')),
    ("a manifest of another kind", "generate", _write("data/queries/manifest.json", b'{"format_version": 1}')),
    ("a table that is cut", "generate", _write("data/queries/train.parquet", b"PAR1")),
    ("a table that is a folder", "generate", _folder("data/queries/train.parquet")),
    ("responses that are cut", "embed", _write("data/responses/part-00000.parquet", b"PAR1")),
    ("targets that are cut", "train", _write("data/targets/part-00000.parquet", b"PAR1")),
    ("no targets", "train", lambda: shutil.rmtree("data/targets")),
    ("a backbone that is gone", "generate", _params(lambda content: content.update(backbone={"name": "models/gone"}))),
    ("a backbone that is an empty folder", "train", _empty_backbone),
    ("no encoder", "evaluate", lambda: shutil.rmtree("models/encoder")),
    ("an encoder that is a file", "evaluate", _write("models/encoder", b"x")),
    ("weights that are cut", "evaluate", _write("models/encoder/student.safetensors", b"x")),
    ("a config that is no JSON", "evaluate", _write("models/encoder/encoder_config.json", b"{")),
    ("a task that is gone", "evaluate", lambda: shutil.rmtree("data/tasks/find")),
    ("a task that is a file", "evaluate", _write("data/tasks/find", b"x")),
    ("a task without front matter", "evaluate", _write("data/tasks/find/README.md", b"words --- and more")),
    ("a judgement of nothing", "evaluate", _write("data/tasks/find/default.jsonl", _NO_QUERY)),
    ("an empty corpus", "evaluate", _write("data/tasks/find/corpus.jsonl", b"")),
    ("a suite whose name is a command", "evaluate", _params(lambda content: content.update(suites=_COMMAND))),
    ("a probe's task that is gone", "probe", lambda: shutil.rmtree("data/tasks/find")),
    ("a summary that is cut", "report", _write("results/evaluate/small/summary.parquet", b"PAR1")),
    ("a record that is no JSON", "report", _write("results/generate.json", b"{")),
)  # fmt: skip


def bad_inputs(arena: Arena) -> None:
    """Each bad input ends its stage with one line; the report, which shows what is missing, may end well."""
    for name, stage, change in BAD_INPUTS:
        _bad_input(arena, name, stage, change)


def _bad_input(arena: Arena, name: str, stage: str, change: Change) -> None:
    tally: Tally = arena.tally
    arena.fresh(stage)
    tally.ended(f"{name}, prepare", run(change, arena.scratch, arena.log), 0)
    ended = arena.run(stage, arena.scratch)
    tally.bad_inputs += 1
    tally.ended(f"{name} ({stage})", ended, *((0, 1) if stage == "report" else (1,)))
    if ended.code == 1 and "error: " not in ended.stderr:
        tally.note(f"{name} ({stage}): no line that says what is wrong: {ended.stderr[-300:]}")
