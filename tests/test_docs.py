"""README and docs name files and commands that exist, link to pages that exist, and show examples that run.

A block of Python runs in a workspace with a trained encoder unless the line before it is `<!-- not run: REASON -->`.
`docs/archive/` keeps the names of its day: only its links are checked.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli.plan import AllParams
from pipeline.cli.presets import presets
from pipeline.core.config import parse_yaml, read_yaml, validate
from pipeline.optim.flops import step_flops
from tests.conftest import ROOT
from tests.encoder.test_inference import write
from tests.test_imports import LIBRARIES, ORDERED

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
CURRENT = {name: text for name, text in PAGES.items() if not name.startswith("docs/archive/")}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES)
current_page = pytest.mark.parametrize("page", CURRENT)


# --- files ----------------------------------------------------------------------------------------------------------

# Followed by `<name>` or `${key}` it is a folder with a placeholder behind it.
FILE = re.compile(r"(?<![\w/.])(?:pipeline|tests|bench|scripts|docs|\.ci)/[\w/.-]*[\w/]")


@current_page
def test_the_files_that_a_page_names_exist(page: str) -> None:
    assert not [name for name in FILE.findall(CURRENT[page]) if not (ROOT / name).exists()]


def test_the_map_is_the_table_of_imports() -> None:
    rows = re.findall(r"^\| (`\w+/`.*?) \|.*\| (.+?) \|$", PAGES["docs/architecture.md"], re.MULTILINE)
    folders = [(re.findall(r"`(\w+)/`", first), last) for first, last in rows]
    libraries = {names[0]: set(re.findall(r"`(\w+)`", last)) for names, last in folders[: len(LIBRARIES)]}
    assert libraries == LIBRARIES
    assert [name for names, _ in folders[len(LIBRARIES) :] for name in names] == list(ORDERED)


def test_the_pages_that_the_code_names_exist() -> None:
    sources = [*(ROOT / "pipeline").rglob("*.py"), *ROOT.glob("params*.yaml")]
    named = {name for path in sources for name in re.findall(r"docs/[\w-]+\.md", path.read_text(encoding="utf-8"))}
    assert named <= PAGES.keys()


def test_the_modules_of_the_api_page_exist() -> None:
    modules = re.findall(r"^::: (\S+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert modules and not [
        name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
    ]


# --- commands -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A command line: the module, its first word after the module, and its options."""

    module: str
    word: str | None
    options: tuple[str, ...]


COMMAND = re.compile(r"(?:python|launch[\w -]*|torchrun[\w -]*) -m (pipeline(?:\.\w+)*)(?!\.<)((?:\\\n|[^`\n#])*)")


def calls(text: str) -> Iterator[Call]:
    """The command lines of a page; one in a span of code may run over the end of a line."""
    joined = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda span: span[0].replace("\n", " "), text)
    for module, rest in COMMAND.findall(joined):
        words = rest.replace("\\\n", " ").split()
        options = [word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
        yield Call(module, words[0] if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else None, tuple(options))


def commands() -> dict[str, Any]:
    """The commands of `python -m pipeline`."""
    from pipeline.__main__ import app

    return cast(Any, typer.main.get_command(app)).commands


def stage_command(module: str) -> Any:
    app = typer.Typer()
    app.command()(importlib.import_module(f"{module}.__main__").main)
    return typer.main.get_command(app)


def mistake(call: Call) -> str | None:
    """What is wrong with a command line."""
    if call.module == "pipeline":
        if call.word not in commands():
            return f"no command {call.word}"
        command = commands()[call.word]
    elif (ROOT / call.module.replace(".", "/") / "__main__.py").is_file():
        command = stage_command(call.module)
    else:
        return f"no module {call.module}"
    known = {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}
    return next(
        (f"{call.word or call.module} takes no {option}" for option in call.options if option not in known), None
    )


def test_the_reader_of_commands() -> None:
    assert [*calls("python -m pipeline encode --model a \\\n  --dtype=x # --no\n`python -m\npipeline.train`")] == [
        Call("pipeline", "encode", ("--model", "--dtype")),
        Call("pipeline.train", None, ()),
    ]
    wrong = [Call("pipeline", "swim", ()), Call("pipeline.swim", None, ()), Call("pipeline", "audit", ("--deep",))]
    assert all(mistake(call) for call in wrong)


@current_page
def test_the_commands_that_a_page_names_exist(page: str) -> None:
    named = [call for call in calls(CURRENT[page]) if (call.module, call.word) != ("pipeline", None)]
    assert not {call: found for call in named if (found := mistake(call))}


@current_page
def test_the_make_targets_that_a_page_names_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:^    |`)(?:\w+=\S+ )*make ([a-z-]+)", CURRENT[page], re.MULTILINE)
    assert not {*named} - targets


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            wrong.append(target)
    assert not wrong


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"docs/{name}" for name in listed} == {name for name in PAGES if name.startswith("docs/")}


# --- examples -------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Processes import the script again, so it must be one.
GUARD = 'if __name__ == "__main__":'
EXAMPLES = [
    pytest.param(
        page, code, id=f"{page}: {code.splitlines()[-1][:40]}", marks=pytest.mark.slow if GUARD in code else ()
    )
    for page, text in CURRENT.items()
    for skipped, code in BLOCK.findall(text)
    if not skipped
]


@pytest.fixture
def encoder(workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with `models/encoder`."""
    # The code of the folder goes to a cache that remembers folders by name.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workspace / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    write(Path("models/encoder"), tiny_backbone("llama"), None, max_query_tokens=128)
    return workspace


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_an_example_runs(encoder: Path, page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    if GUARD in code:
        Path("script.py").write_text(code)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "script.py"], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "(100, 5)\n"), done.stderr
        return
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    for name in {"scores", "vectors"} & names.keys():
        assert np.isfinite(np.asarray(names[name])).all()
    if "encode_stream" in code:
        assert capsys.readouterr().out == "(500, 5)\n(500, 5)\n"


# --- params ---------------------------------------------------------------------------------------------------------


def params_blocks() -> Iterator[Any]:
    """YAML blocks of pages whose first key is a section of params."""
    for page, text in CURRENT.items():
        for at, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)):
            if block.partition(":")[0] in AllParams.model_fields:
                yield pytest.param(block, id=f"{page}-{at}")


@pytest.mark.parametrize("block", list(params_blocks()))
def test_params_that_a_page_shows_are_accepted(block: str) -> None:
    shown, content = parse_yaml(block.encode(), "block"), read_yaml(ROOT / "params.yaml")
    for name, section in shown.items():
        content[name].update(section)
    validate(content, AllParams, where="params.yaml")


# --- figures --------------------------------------------------------------------------------------------------------

COST = re.compile(r"^\| `([\w.-]+)`.*\| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) h \|$", re.MULTILINE)
# What the README assumes: rows of training, tokens of a query and of a response, operations a second.
ROWS, LENGTHS, RATE = 158_400, (512, 512), 400e12


def printed(workspace: Path, *arguments: str) -> str:
    """Output of a command of `python -m pipeline` on `params.yaml` in the workspace."""
    from pipeline.__main__ import app

    done = CliRunner().invoke(app, [*arguments, "--params", str(workspace / "params.yaml")], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "weights", "memory", "hours"), COST.findall(PAGES["README.md"]))
def test_the_cost_of_a_run_is_what_the_project_computes(
    workspace: Path, preset: str, weights: str, memory: str, hours: str
) -> None:
    shutil.copy(ROOT / "params.yaml", workspace)
    printed(workspace, "backbone", preset)
    train = next(line for line in printed(workspace, "params").splitlines() if re.match(r"\W*train ", line))
    assert f"at most {memory} GB (weights {weights}," in train
    operations = ROWS * step_flops(presets()[preset].sizes, [LENGTHS], compression_tokens=10)
    assert f"{operations / RATE / 3600:.1f}" == hours
