"""Who may import whom (docs/architecture.md has the table), and heavy packages only where they are used.

Reads the source without running it. Imports inside functions count; imports for type checkers alone do not.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline.core.code_digest import imported_modules
from tests.conftest import ROOT

PACKAGE = "pipeline"
LIBRARIES = {
    "core": set(),
    "parallel": {"core"},
    "backbone": {"core"},
    "tasks": {"core"},
    "optim": {"core", "backbone"},
    "encoder": {"core", "parallel", "backbone", "tasks", "optim"},
}
# Each imports the libraries and what stands before it; `teach` scores its teacher with `evaluate`, `probe` uses `lens`.
ORDERED = (
    "collect",
    "generate",
    "embed",
    "train",
    "evaluate",
    "teach",
    "readings",
    "lens",
    "probe",
    "audit",
    "report",
    "compare",
    "export",
    "preview",
    "cli",
)
STAGES = ("collect", "generate", "teach", "embed", "train", "evaluate", "probe", "report")
LOOSE = {"__init__", "__main__", "api"}
HEAVY = {"torch", "transformers", "vllm", "sentence_transformers", "mteb", "datasets", "matplotlib"}
NOT_IN_CORE = {"torch", "vllm", "transformers", "dvc"}
FOLDERS = {*LIBRARIES, *ORDERED}
# What another library shows of its own libraries: these have to be the versions that it brings.
COMES_WITH = {"pytrec_eval": "mteb", "sklearn": "mteb", "scmrepo": "dvc"}


def allowed(folder: str) -> set[str]:
    """The folders that modules of a folder may import."""
    if folder in LIBRARIES:
        return {folder} | LIBRARIES[folder]
    return {*LIBRARIES, *ORDERED[: ORDERED.index(folder) + 1]}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def ours(module: str, *, on_import: bool = False) -> set[str]:
    """Modules of ours that a module imports; with `on_import` only those that loading it executes."""
    return known(imported(MODULES[module].read_text(encoding="utf-8"), on_import=on_import))


def known(names: set[str]) -> set[str]:
    """The modules among dotted names that may end in an attribute."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def imported(source: str, *, on_import: bool) -> set[str]:
    tree = ast.parse(source)
    return set(_loaded(tree)) if on_import else set(imported_modules(tree))


def _loaded(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import() | ast.ImportFrom():
                yield from imported_modules(child)
        yield from _loaded(child)


def packages(module: str, *, on_import: bool = False) -> set[str]:
    """Top-level packages that a module imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = _statements(tree) if on_import else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            yield child
            yield from _statements(child)


# --- the reader of imports itself -----------------------------------------------------------------------------------

EXAMPLE = """
from pipeline.a import b
import pipeline.c as d, json
if TYPE_CHECKING:
    from pipeline.typed import x
class N:
    from pipeline.e import f
    def method(self):
        import pipeline.late
WHERE = "pipeline.named:Class"
"""


def test_the_reader_of_imports() -> None:
    at_load = {"pipeline.a.b", "pipeline.c", "pipeline.e.f"}
    assert imported(EXAMPLE, on_import=True) == at_load
    assert imported(EXAMPLE, on_import=False) == at_load | {"pipeline.late", "pipeline.named"}


def test_the_modules_are_found() -> None:
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} == FOLDERS
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == LOOSE
    assert f"{PACKAGE}.core.artifacts" in ours(f"{PACKAGE}.collect.__main__")


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_only_what_the_table_allows(folder: str) -> None:
    wrong = [
        f"{module} -> {other}"
        for module in MODULES
        if module.split(".")[1:2] == [folder]
        for other in ours(module)
        if other != PACKAGE and other.split(".")[1] not in allowed(folder)
    ]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_an_entry_point(module: str) -> None:
    assert not {name for name in ours(module) if name.endswith("__main__") and name != module}


def test_no_module_imports_relatively() -> None:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], module


def test_no_circle() -> None:
    """No cycle among the modules, imports inside functions included."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(ours(module) - {PACKAGE, module}):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        if module != PACKAGE:
            visit(module, ())


# --- heavy packages -------------------------------------------------------------------------------------------------


# Loaded when a run begins, by nothing that has to answer at once.
LOADED_LATE = (
    "encoder.",
    "backbone.attention.",
    "backbone.fused",
    "backbone.output_head",
    "backbone.sharding",
    "optim.checkpoint",
    "optim.gradients",
    "optim.late",
    "train.data",
    "train.losses",
    "train.trainer",
    "train.refine",
    "train.states",
    "train.warm_start",
    "readings.states",
)


def may_be_heavy(module: str) -> set[str]:
    return HEAVY if module.startswith(tuple(f"{PACKAGE}.{name}" for name in LOADED_LATE)) else set()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"pipeline.compare.runs"}))
def test_no_module_imports_dvc_but_the_reader_of_revisions(module: str) -> None:
    assert "dvc" not in packages(module)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(f"{PACKAGE}.core")])
def test_core_imports_no_heavy_package(module: str) -> None:
    assert not packages(module) & NOT_IN_CORE


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    assert not packages(module, on_import=True) & HEAVY - may_be_heavy(module)


@pytest.mark.parametrize("module", [name for name in MODULES if name.endswith("__main__")])
def test_a_command_shows_its_help_without_loading_a_heavy_package(module: str) -> None:
    reached, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in reached:
            reached.add(current)
            todo += ours(current, on_import=True)
    assert not {name: heavy for name in reached if (heavy := packages(name, on_import=True) & HEAVY)}


# --- what pyproject.toml asks for -----------------------------------------------------------------------------------


def project_name(requirement: str) -> str:
    """`ray` of `ray[data]>=2.60`, as the package index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_every_library_that_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("gpu", "cpu", "ray", "track", "quantize", "demo")
    asked = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    declared = set(map(project_name, asked))
    assert {"numpy", "ray", "vllm", "dvc"} <= declared
    shipped = packages_distributions()
    for module in MODULES:
        for package in packages(module) - sys.stdlib_module_names - {PACKAGE}:
            name = COMES_WITH.get(package, package)
            distributions = set(map(project_name, shipped.get(name, [name])))
            assert distributions & declared, f"{module} imports {package}, which pyproject.toml does not ask for"
