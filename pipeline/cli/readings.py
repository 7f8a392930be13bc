"""The command readings: what each reading of the backbone is worth, before anything is trained."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ParamsOption, one_of, print_table
from pipeline.core.config import PARAMS_FILE

if TYPE_CHECKING:
    from pipeline.readings.build import Found, Request
    from pipeline.readings.measure import Interval, Line


def readings(
    params: ParamsOption = PARAMS_FILE,
    suite: Annotated[
        str | None, typer.Option(help="Whose tasks are scored; by default the local tasks of all suites.")
    ] = None,
    reading: Annotated[list[str] | None, typer.Option(help="A reading to measure; repeatable; by default all.")] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="A share of the predicted response; repeatable; by default 0.3, 0.5 and 1."),
    ] = None,
    targets: Annotated[
        str,
        typer.Option(help="Of the closed form: echo (reading of the answers) or stored (those in data/targets)."),
    ] = "echo",
    refine: Annotated[bool, typer.Option("--refine", help="Refine the closed form by contrast as well.")] = False,
    form: Annotated[
        str, typer.Option(help="How a share below 1 and the reading are joined: beside, or added in one space.")
    ] = "beside",
    rows: Annotated[int, typer.Option(min=20, help="Most training queries that are read.")] = 4000,
    heldout: Annotated[int, typer.Option(min=2, help="Most held-out queries.")] = 500,
    skip: Annotated[
        int, typer.Option(min=0, help="Leave out the first training queries, for another draw of the same data.")
    ] = 0,
    decorrelate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of the echo targets, as embed.transform.decorrelate, and of the readings."),
    ] = 0.0,
    shrinkage: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of --decorrelate, as embed.transform.shrinkage; by default auto."),
    ] = None,
    decorrelate_reading: Annotated[
        bool, typer.Option("--decorrelate-reading", help="Join the reading decorrelated, as train.decorrelate_reading.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare what can be read of the backbone: raw, standardised, and in closed form to its answers."""
    from pipeline.core.config import load
    from pipeline.core.run import device_memory, setup_logging

    setup_logging()
    with device_memory("evaluate.batch_tokens"):
        from pipeline.encoder.folder.config import ResponseForm
        from pipeline.readings.build import Inputs, Request, Targets, run

        defaults, chosen, joined = Request(), one_of(Targets, targets, "targets"), one_of(ResponseForm, form, "form")
        request = Request(
            suite=suite,
            readings=reading or (),
            shares=share or defaults.shares,
            targets=chosen,
            refine=refine,
            rows=rows,
            heldout=heldout,
            form=joined,
            skip=skip,
            decorrelate=decorrelate,
            decorrelate_reading=decorrelate_reading,
            shrinkage="auto" if shrinkage is None else shrinkage,
        )
        found = run(load(params, Inputs), request)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found, request)


def _print(found: "Found", request: "Request") -> None:
    from rich.table import Table

    table = Table("reading", "kind", "share", "query to answer", "mean of tasks", "gain over the bar", *found.tasks)
    for line in found.lines:
        share = "" if line.share is None else f"{line.share:g}"
        scores = (_number(line.scores[task]) for task in found.tasks)
        intervals = (_shown(line.top1), _shown(line.mean), _shown(line.gain, sign="+"))
        table.add_row(line.reading, line.kind, share, *intervals, *scores)
    print_table(table)
    print("\n".join(_notes(found, request)))


def _notes(found: "Found", request: "Request") -> Iterator[str]:
    yield f"{found.rows} training queries, {found.heldout} held out, backbone {found.backbone['name']}."
    if found.answered:
        echo = f"{'decorrelated' if request.decorrelate else 'standardised'} echo reading"
        kind = echo if found.targets == "echo" else "target in data/targets"
        own = "decorrelated" if request.decorrelate_reading else "standardised"
        joined = "beside" if request.form == "beside" else "added to"
        yield (
            "query to answer: share of held-out queries whose own answer is the nearest. The closed form predicts the "
            f"{kind} of the answer; a share below 1 has the {own} reading {joined} it."
        )
    if not found.tasks:
        return
    yield "gain over the bar: mean less that of the best reading without closed form, on the same resamples."
    bar = _best([line for line in found.lines if line.share is None])
    yield f"Without training the best mean is {_named(bar)}."
    if predicted := [line for line in found.lines if line.share is not None]:
        yield f"With the closed form it is {_named(_best(predicted))}. Chosen on these tasks, so a little too good."


def _best(lines: Sequence["Line"]) -> "Line":
    return max(lines, key=lambda line: line.mean.value if line.mean else 0.0)


def _named(line: "Line") -> str:
    share = "" if line.share is None else f" at share {line.share:g}"
    return f"{_shown(line.mean)}: {line.reading}, {line.kind}{share}"


def _shown(interval: "Interval | None", sign: str = "") -> str:
    """A value with its interval: `.723 (.701 to .744)`."""
    if interval is None:
        return "-"
    value = _number(interval.value, sign)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} ({_number(interval.low, sign)} to {_number(interval.high, sign)})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1)
