"""The code that a module runs: its import closure, and a digest of it that ignores docstrings and comments.

Both are read from syntax trees; nothing is imported. A training checkpoint is keyed by the digest of the modules that
decide a step: an edit of a loss voids it, an edit of a docstring does not.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "pipeline"
ROOT = Path(__file__).resolve().parent.parent.parent
_MODULE = re.compile(rf"{PACKAGE}(\.\w+)+(?=:|$)")


def import_closure(modules: Iterable[str], root: Path = ROOT) -> set[Path]:
    """Files below `root` that running these modules imports, at any depth, relative to `root`.

    Counted: imports at module level and inside functions, the `__init__` of each package on the way, and modules named
    in strings ("pipeline.generate.engines.vllm:VllmEngine"). Not counted: imports for type checkers alone.
    """
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        for path in _files_of(root, waiting.pop()):
            if path not in found:
                found.add(path)
                waiting += imported_modules(ast.parse(path.read_bytes()))
    return {path.relative_to(root) for path in found}


def code_digest(modules: Iterable[str], root: Path = ROOT) -> str:
    """sha256 (hex) of the import closure of `modules`: each file's name and its syntax tree without docstrings."""
    digest = hashlib.sha256()
    for path in sorted(import_closure(modules, root)):
        digest.update(f"{path.as_posix()}\n{_without_docstrings((root / path).read_bytes())}\n".encode())
    return digest.hexdigest()


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Dotted names of this package that a syntax tree imports or names in a string; each may end in an attribute."""
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            for statement in node.orelse:
                yield from imported_modules(statement)
            return
        case ast.Import(names=names):
            yield from (alias.name for alias in names if _ours(alias.name))
        case ast.ImportFrom(module=str(module), names=names, level=0) if _ours(module):
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.Constant(value=str(text)) if match := _MODULE.match(text):
            yield match.group()
    for child in ast.iter_child_nodes(node):
        yield from imported_modules(child)


def _ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def _files_of(root: Path, dotted: str) -> list[Path]:
    """The files that importing a dotted name executes: its packages' `__init__` and its module or `__main__`."""
    parts = dotted.split(".")
    prefixes = [root.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    candidates = [path for base in prefixes for path in (base / "__init__.py", base.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]


def _without_docstrings(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
