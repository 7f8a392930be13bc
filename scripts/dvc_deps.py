"""Keep each stage's code deps in dvc.yaml equal to what its module imports, file by file.

    python scripts/dvc_deps.py --check     # exit 1 and the differences
    python scripts/dvc_deps.py --write     # update dvc.yaml in place

DVC does not follow imports. The closure is read from the syntax trees: imports at any depth, packages' __init__ files,
modules named in strings ("pipeline.engines.x:Class"), and YAML files beside a module that it names; imports for type
checkers alone do not count.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pipeline"
KEYED = f"{PACKAGE}/probes/${{key}}.py"
_MODULE = re.compile(rf"{PACKAGE}(\.\w+)+")
_CODE_DEP = re.compile(rf"{PACKAGE}/.*\.(py|yaml)")


def module_file(root: Path, module: str) -> Path | None:
    """The file of a module or package of ours, None for anything else (a namespace package has no file)."""
    base = root.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported_modules(path: Path) -> Iterator[str]:
    """Names under `pipeline` that a file imports or names in a string, as dotted names that may end in an attribute."""
    yield from _imported(ast.parse(path.read_text(encoding="utf-8")))


def _imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            for statement in node.orelse:
                yield from _imported(statement)
            return
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.Constant(value=str(text)) if match := _MODULE.match(text):
            yield match.group()
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


def data_files(path: Path) -> Iterator[Path]:
    """The YAML files beside a module that a string in it names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(value=str(text)) if text.endswith(".yaml") and (found := path.with_name(text)).is_file():
                yield found


def closure(root: Path, module: str) -> set[str]:
    """Files (relative to `root`) that running `module` imports or reads, its own included; empty ones hold nothing."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for path in _files_of(root, waiting.pop()):
            name = path.relative_to(root).as_posix()
            if name not in found and path.stat().st_size:
                found.add(name)
                found.update(data.relative_to(root).as_posix() for data in data_files(path))
                waiting += [other for other in imported_modules(path) if other.split(".")[0] == PACKAGE]
    return found


def _files_of(root: Path, dotted: str) -> list[Path]:
    """The files that importing a dotted name executes: its packages' __init__ files and its module."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return [path for prefix in prefixes if (path := module_file(root, prefix))]


def stage_deps(root: Path, command: str) -> list[str]:
    """The code deps of the stage with this command line, sorted.

    The stage `probe` imports the probe that its key names: that file is the keyed dep, and what any probe imports
    besides is common to all.
    """
    module = next(word for word in command.split() if word.startswith(f"{PACKAGE}.stages."))
    found = closure(root, module)
    if module == f"{PACKAGE}.stages.probe":
        for probe in _probes(root):
            found |= closure(root, f"{PACKAGE}.probes.{probe.stem}") - {probe.relative_to(root).as_posix()}
        found.add(KEYED)
    return sorted(found)


def _probes(root: Path) -> list[Path]:
    files = sorted((root / PACKAGE / "probes").glob("*.py"))
    return [path for path in files if re.search(r"^PARAMS\b", path.read_text(encoding="utf-8"), re.MULTILINE)]


def updated(root: Path, text: str) -> str:
    """dvc.yaml's text with the code deps of every stage replaced; other deps and comments stay."""
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text)
    for stage in content["stages"].values():
        body = stage.get("do", stage)
        _replace(body["deps"], stage_deps(root, body["cmd"]))
    sink = StringIO()
    yaml.dump(content, sink)
    return sink.getvalue()


def _replace(deps: Any, code: list[str]) -> None:
    others = sorted(str(dep) for dep in deps if not _CODE_DEP.fullmatch(str(dep)))
    wanted = [*others, *code]
    if list(deps) != wanted:
        # Slice assignment would drop the blank line that ruamel keeps with the last item.
        trailing = deps.ca.items.pop(len(deps) - 1, None)
        deps[:] = wanted
        if trailing:
            deps.ca.items[len(deps) - 1] = trailing


def differences(before: str, after: str) -> list[str]:
    """Lines that differ, as `- old` and `+ new`."""
    import difflib

    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "dvc.yaml", "wanted", lineterm="", n=8)
    return list(lines)


def main() -> int:
    """Check or write dvc.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="exit 1 if dvc.yaml differs")
    action.add_argument("--write", action="store_true", help="update dvc.yaml")
    arguments = parser.parse_args()
    path = ROOT / "dvc.yaml"
    before = path.read_text(encoding="utf-8")
    after = updated(ROOT, before)
    if arguments.write:
        path.write_text(after, encoding="utf-8")
        return 0
    print("\n".join(differences(before, after)))
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
