"""The import arrows: stages -> domain -> foundation, and heavy packages only where they are used.

Reads the source without running it. "On import" means what loading a module executes: function bodies and
`if TYPE_CHECKING:` blocks do not count there, but they do for the arrows between our own modules.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pipeline"
FOUNDATION = {f"{PACKAGE}.{name}" for name in ("errors", "params", "contracts", "artifacts", "shards", "runtime")}
HEAVY = {"torch", "transformers", "vllm", "sentence_transformers", "mteb", "datasets", "matplotlib"}
NOT_IN_FOUNDATION = {"torch", "vllm", "transformers", "dvc"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, *, on_import: bool) -> Iterator[ast.AST]:
    """Every node below; with `on_import` only those that run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        yield child
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
        if not (on_import and deferred):
            yield from walk(child, on_import=on_import)


def imports_of(source: str, module: str, is_package: bool, *, on_import: bool) -> set[str]:
    """Full dotted names that a module imports; `from a import b` gives `a` and `a.b`."""
    found: set[str] = set()
    for node in walk(ast.parse(source), on_import=on_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*above, base] if base else above)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imports(module: str, *, on_import: bool = False) -> set[str]:
    path = MODULES[module]
    return imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", on_import=on_import)


def ours(module: str, *, on_import: bool = False) -> set[str]:
    return imports(module, on_import=on_import) & MODULES.keys()


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def is_entry_point(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.stages") or module == f"{PACKAGE}.__main__"


# Loaded when a run begins, by nothing that has to answer at once.
TRAINING = {f"{PACKAGE}.training.{name}" for name in ("assembly", "gradients", "starting")}
# Copied into encoder folders; nothing here imports it.
STANDALONE = f"{PACKAGE}.interop.st_module"


def may_be_heavy(module: str) -> set[str]:
    if module.startswith(f"{PACKAGE}.encoder") or module in TRAINING or module == STANDALONE:
        return HEAVY
    return {"torch"} if module == f"{PACKAGE}.lens" else set()


# --- the reader of imports itself -----------------------------------------------------------------------------------

EXAMPLE = """
import a.b, c as d
from e import f
from . import g
from .h import i
from ..j import k
if TYPE_CHECKING:
    import l
try:
    import m
except ImportError:
    pass
class N:
    import o
    def method(self):
        import p
async def q():
    from r import s
"""


def test_the_reader_tells_what_loading_executes() -> None:
    loaded = imports_of(EXAMPLE, "x.y.z", is_package=False, on_import=True)
    at_load = {"a.b", "c", "e", "e.f", "x.y", "x.y.g", "x.y.h", "x.y.h.i", "x.j", "x.j.k", "m", "o"}
    assert loaded == at_load
    assert imports_of(EXAMPLE, "x.y.z", is_package=False, on_import=False) == at_load | {"l", "p", "r", "r.s"}
    assert imports_of("from .a import b", "x.y", is_package=True, on_import=True) == {"x.y.a", "x.y.a.b"}
    assert imports_of("from ..a import b", "x.y", is_package=True, on_import=True) == {"x.a", "x.a.b"}


def test_the_modules_are_found() -> None:
    assert MODULES.keys() >= FOUNDATION
    assert f"{PACKAGE}.stages.collect" in MODULES
    assert ours(f"{PACKAGE}.stages.collect") >= {f"{PACKAGE}.queries", f"{PACKAGE}.artifacts", f"{PACKAGE}.errors"}


# --- the arrows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(FOUNDATION))
def test_the_foundation_stands_on_nothing_of_ours_and_nothing_heavy(module: str) -> None:
    assert ours(module) <= FOUNDATION | {PACKAGE}
    assert not packages(imports(module)) & NOT_IN_FOUNDATION


@pytest.mark.parametrize("module", MODULES)
def test_only_entry_points_import_stages(module: str) -> None:
    if not is_entry_point(module):
        assert not {name for name in ours(module) if is_entry_point(name)}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_dvc(module: str) -> None:
    assert "dvc" not in packages(imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    assert not packages(imports(module, on_import=True)) & HEAVY - may_be_heavy(module)


@pytest.mark.parametrize("module", [module for module in MODULES if is_entry_point(module)])
def test_a_command_shows_its_help_without_loading_a_heavy_package(module: str) -> None:
    reached, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in reached:
            reached.add(current)
            todo += ours(current, on_import=True)
    assert not {name: heavy for name in reached if (heavy := packages(imports(name, on_import=True)) & HEAVY)}


def test_no_module_waits_for_itself() -> None:
    """No cycle among the imports that loading executes."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(ours(module, on_import=True) - {PACKAGE, module}):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
