"""Which probes there are and what the report says of each, read from their source so that no probe is imported.

An edit of a description reruns the probe, as any edit of its module.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Description:
    """What the report says of a probe; its module assigns one, with literal arguments only, to `DESCRIPTION`.

    Metrics that begin with `lower_is_better` are better lower. `instructed`: queries are read with the systems'
    instruction.
    """

    note: str = ""
    lower_is_better: tuple[str, ...] = ()
    instructed: bool = True


def probe_names() -> list[str]:
    """The modules of this folder that assign `PARAMS`."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "PARAMS" in _assigned(path.stem))


def describe(name: str) -> Description:
    """The description of a probe; an empty one if its module is gone or has none."""
    call = _assigned(name).get("DESCRIPTION") if name in probe_names() else None
    if not isinstance(call, ast.Call):
        return Description()
    return Description(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})


@cache
def _assigned(name: str) -> dict[str, ast.expr]:
    """Values of a module's top-level assignments to one name."""
    body = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")).body
    return {
        statement.targets[0].id: statement.value
        for statement in body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
