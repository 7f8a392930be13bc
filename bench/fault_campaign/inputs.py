"""Bad inputs: damaged params and artifacts for every stage, and awkward files for every command that reads files.

The awkward files are those of `tests/core/readers/awkward.py`, the commands those of the README and their like.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.fault_campaign import workspace
from bench.fault_campaign.processes import Work, run
from bench.fault_campaign.stages import Arena
from tests.core.readers.awkward import CASES, Awkward

ROOT = Path(__file__).resolve().parents[2]

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


def bad_inputs(arena: Arena, *, every: int = 1) -> None:
    """Each bad input ends its stage with one line; the report, which shows what is missing, may end well."""
    for name, stage, change in BAD_INPUTS[::every]:
        if stage in arena.before:
            arena.fresh(stage)
            arena.tally.ended(f"{name}, prepare", run(change, arena.scratch, arena.log), 0)
            codes = (0, 1) if stage == "report" else (1,)
            _meets(arena, f"{name} ({stage})", workspace.stage(stage), *codes)


def awkward_files(arena: Arena, *, every: int = 1) -> None:
    """Each awkward file through every way in: read, or refused in a line."""
    for case in CASES[::every]:
        workspace.copy(arena.finished, arena.scratch)
        for name, work, codes in _ways_in(case, arena.scratch):
            _meets(arena, f"{name}: {case.name}", work, *codes)


def readme_commands(arena: Arena, *, every: int = 1) -> None:
    """Every `python -m pipeline ...` of the README, on awkward files: where it names a file, on each of them."""
    for words in commands_of((ROOT / "README.md").read_text(encoding="utf-8")):
        workspace.copy(arena.finished, arena.scratch)
        if not FILES_OF_THE_README & {*words}:
            _use_as_sources(arena.scratch, CASES[::every])
            _meets(arena, shlex.join(words), _command(*words), 0, 1)
            continue
        for case in CASES[::every]:
            shutil.rmtree(arena.scratch / "in", ignore_errors=True)
            path = str(case.write(arena.scratch / "in").relative_to(arena.scratch))
            given = [path if word in FILES_OF_THE_README else word for word in words]
            _meets(arena, f"{shlex.join(words)}: {case.name}", _command(*given), *_codes(case))


FILES_OF_THE_README = {"texts.txt", "passages.parquet"}
_COMMAND_LINE = re.compile(r"^    python -m pipeline (.+?)(?:\s+#.*)?$", re.MULTILINE)


def commands_of(page: str) -> list[list[str]]:
    """The words of each command line in the indented blocks of a page, comments apart."""
    return [shlex.split(line) for line in _COMMAND_LINE.findall(page)]


def _meets(arena: Arena, where: str, work: Work, *codes: int) -> None:
    """Do it in the scratch workspace and count it; with exit code 1 it says what is wrong."""
    tally = arena.tally
    ended = run(work, arena.scratch, arena.log)
    tally.bad_inputs += 1
    tally.ended(where, ended, *codes)
    if ended.code == 1:
        tally.explained(where, ended, "error: ", "findings")


def _codes(case: Awkward) -> tuple[int, ...]:
    """How a command ends that needs a text in each row."""
    return (1,) if case.refusal or None in case.texts else (0,)


def _ways_in(case: Awkward, folder: Path) -> Iterator[tuple[str, Work, tuple[int, ...]]]:
    """The commands that read files, each with its exit codes; the workspace changes from one to the next."""
    file, codes = str(case.write(folder / "in").relative_to(folder)), _codes(case)
    model, short = ("--model", workspace.OUTPUTS["train"]), ("--max-new-tokens", "1")
    yield "encode", _command("encode", *model, "--input", file, "--output", "out.parquet"), codes
    yield "search", _command("search", *model, "--corpus", file, "what?", *short), codes
    outputs = ("--output", "answers.parquet", "--vocabulary", "0")
    yield "decode", _command("decode", *model, "--input", file, *outputs, *short), codes
    _use_as_corpus(folder / "data" / "tasks" / "find", case)
    yield "evaluate", workspace.stage("evaluate"), (1,)  # its passages have no _id
    _use_as_sources(folder, [case])
    yield "collect", workspace.stage("collect"), (1,) if case.refusal else (0,)


def _use_as_corpus(task: Path, case: Awkward) -> None:
    """Make the files the passages of a local task."""
    case.write(task / "in")
    names = [name for name in sorted(case.files) if name != case.path and not re.search(r"README|/[._]", name)]
    files = "".join(f"  - {{split: corpus, path: 'in/{name}'}}\n" for name in names)
    text = (task / "README.md").read_text()
    (task / "README.md").write_text(text.replace("  - {split: corpus, path: corpus.jsonl}\n", files))


def _use_as_sources(folder: Path, cases: Sequence[Awkward]) -> None:
    """Make the files sources of `collect`, beside the one that is there."""
    params = json.loads((folder / "params.yaml").read_text())
    place = folder / "data" / "sources"
    for number, case in enumerate(cases):
        path = case.write(place / f"in-{number}").relative_to(place)
        params["collect"]["sources"].append({"kind": "local", "path": str(path)})
    (folder / "params.yaml").write_text(json.dumps(params))


def _command(*words: str) -> Work:
    def work() -> None:
        from pipeline.__main__ import app

        app(list(words), prog_name="python -m pipeline")

    return work
