"""Rows that were read, as a page of its own: one HTML file that asks for no other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.lens.faithfulness import Summary
from pipeline.printable import templates, visible

# A page of more is slow to open; the Parquet file has them all.
PAGE_ROWS = 500


def render_page(rows: pa.Table, total: int, summaries: Mapping[str, Summary], title: str) -> str:
    """The page of the first `PAGE_ROWS` of `total` rows (schema `reading.ROWS`)."""
    environment = templates(Path(__file__).parent)
    environment.filters.update(number=number, token=token)
    shown = rows.slice(0, PAGE_ROWS).to_pylist()
    has = {name: _has(shown, name) for name in ("query", "response", "vocabulary", "nearest")}
    template = environment.get_template("page.html.j2")
    return template.render(rows=shown, total=total, summaries=summaries, title=title, has=has)


def number(value: float | None) -> str:
    """A cosine or probability; a dash for none."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def token(text: str) -> str:
    """An entry of a vocabulary, its white space shown: a word begins with a space in most."""
    return visible(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _has(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(row[name] is not None for row in rows)
