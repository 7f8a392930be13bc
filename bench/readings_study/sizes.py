"""Closed forms from fewer and from more rows: disjoint draws of one workspace's data, scored on the same tasks.

Each finished draw is a line of `sizes.jsonl` in the workspace, so that a killed study goes on where it was; states and
scores of tasks are kept by the command itself. A table has one line for each setting: the mean over the draws of a
size, the mean of their intervals' ends, and the standard deviation between draws. Draws share tasks and resamples, so
their intervals say what other texts would change, the deviation what other training rows would.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.encoder.folder.config import ResponseForm

FORMS: "tuple[ResponseForm, ...]" = ("beside", "added")
Line = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """`size` training rows behind the first `skip`."""

    size: int
    skip: int


def draws(sizes: Sequence[int], rows: int, most: int) -> list[Draw]:
    """At most so many disjoint draws of each size, as `rows` allow; the largest size may be a little short."""
    return [Draw(size, size * at) for size in sizes for at in range(min(most, max(1, rows // size)))]


def measure_draws(folder: Path, wanted: Sequence[Draw], options: Line) -> list[Line]:
    """The lines of all draws, in each form; `options` are those of `Request`."""
    kept = folder / "sizes.jsonl"
    lines: list[Line] = [json.loads(row) for row in kept.read_text().splitlines()] if kept.is_file() else []
    for draw in wanted:
        key = {"draw": asdict(draw), "options": options}
        if not any(line["key"] == key for line in lines):
            found = [{"key": key, **line} for line in measured(folder, draw, options)]
            with kept.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in found)
            lines += found
    return [line for line in lines if line["key"] in [{"draw": asdict(d), "options": options} for d in wanted]]


def measured(folder: Path, draw: Draw, options: Line) -> Iterator[Line]:
    """The lines of a draw; what has no share of a reading is the same in each form and comes once."""
    from pipeline.core.config import PARAMS_FILE, load
    from pipeline.readings.build import Inputs, Request, run

    os.chdir(folder)
    request = Request(**options, rows=draw.size, skip=draw.skip)
    for form in FORMS:
        found = run(load(PARAMS_FILE, Inputs), replace(request, form=form))
        for line in found.lines:
            shared = line.share is not None and line.share < 1
            if shared or form == FORMS[0]:
                yield {"size": draw.size, "form": form if shared else None, "rows": found.rows, **asdict(line)}


def table(lines: Sequence[Line]) -> list[Line]:
    """One line for each size and setting, in the order of their first draw."""
    by_setting: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        by_setting[line["size"], line["reading"], line["kind"], line["share"], line["form"]].append(line)
    return [summary(key, found) for key, found in by_setting.items()]


def summary(key: tuple[Any, ...], found: Sequence[Line]) -> Line:
    """The draws of one setting."""
    size, reading, kind, share, form = key
    return {
        "rows": f"{len(found)} x {size:,}",
        "reading": reading,
        "kind": kind + (f" {share:g}" if share else "") + (f" {form}" if form else ""),
        "mean": interval(found, "mean"),
        "± draws": f"{np.std([line['mean']['value'] for line in found], ddof=1):.3f}" if len(found) > 1 else "",
        "over the bar": interval(found, "gain", "+"),
        "query to answer": interval(found, "top1"),
        **{name: f"{np.mean([line['scores'][name] for line in found]):.3f}" for name in found[0]["scores"]},
    }


def interval(found: Sequence[Line], field: str, sign: str = "") -> str:
    """Mean of a field over draws with the mean ends of its intervals."""
    if found[0][field] is None:
        return ""
    ends = [f"{np.mean([line[field][part] for line in found]):{sign}.3f}" for part in ("value", "low", "high")]
    return "{} ({} to {})".format(*(end.replace("0.", ".", 1) for end in ends))
