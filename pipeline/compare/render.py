"""A comparison of runs as a page, as Markdown, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from pipeline.compare.comparison import RunComparison
from pipeline.core.bootstrap import BootstrapParams
from pipeline.report.render import environment


def render(found: RunComparison, format: str, settings: BootstrapParams) -> str:
    """The comparison in a `format` of the report's macros: "html" (one file that loads nothing else) or "markdown"."""
    template = environment(format, Path(__file__).parent).get_template("compare.j2")
    level = f"{100 * settings.level:g}"
    return template.render(found=found, format=format, level=level, headings=short_names(found.runs))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them lie in, for the columns of a table."""
    parts = [PurePath(name).parts for name in names]
    shared = next((depth for depth, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    return ["/".join(part[shared:]) for part in parts]


def to_dict(found: RunComparison) -> dict[str, Any]:
    """The comparison as values that serialise to JSON: for each table and metric a cell a run, in the order of runs."""
    tables = {
        table.name: {row.metric: [asdict(cell) for cell in row.cells] for row in table.rows} for table in found.tables
    }
    return {
        "runs": found.runs,
        "tables": tables,
        "params": found.params,
        "seconds": found.seconds,
        "notes": found.notes,
    }
