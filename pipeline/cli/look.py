"""Commands that look at runs: audit, inspect, compare."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import print_table

if TYPE_CHECKING:
    from pipeline.audit import AuditReport


def audit(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False) -> None:
    """Verify every artifact: hashes, schemas, ids, models, dvc.lock. Exits with 1 on a finding, or if none is here."""
    from pipeline.audit import audit as run_audit

    report = run_audit()
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_audit(report)
    sys.exit(bool(report.findings) or not report.verified)


def _print_audit(report: "AuditReport") -> None:
    for finding in report.findings:
        print(finding.line())
    for absent in report.unverifiable:
        print(f"not verifiable here: {absent.line()}", file=sys.stderr)
    for name in report.not_made:
        print(f"{name}: not made yet", file=sys.stderr)
    if report.findings:
        print(f"{len(report.findings)} findings", file=sys.stderr)
        return
    if not report.verified:
        print("error: nothing to verify: no stage has written an artifact in this folder", file=sys.stderr)
        return
    from rich.table import Table

    table = Table("artifact", "rows", "files", "bytes", "counts")
    for item in report.verified:
        rows = f"{item.rows:,}" if item.rows else ""
        table.add_row(item.artifact, rows, str(item.files), f"{item.bytes:,}", item.note)
    print_table(table)
    locked = "no dvc.lock" if report.locked is None else f"{report.locked} outs agree with dvc.lock"
    print(f"no findings in {len(report.verified)} artifacts, {locked}")


def inspect(
    stage: Annotated[str, typer.Argument(help="collect, generate, teach, embed, train, evaluate, probe or report.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many rows.")] = 5,
    row: Annotated[
        str | None, typer.Option("--id", help="An id, or its beginning: that row through all stages.")
    ] = None,
) -> None:
    """Show what a stage counted, made and failed at, or one row through all stages."""
    from pipeline.audit.inspect import check_stage, counts, failures, show, trace

    check_stage(stage)
    tables = [trace(row)] if row is not None else [counts(stage), show(stage, n), failures(stage, n)]
    for table in tables:
        if table is not None:
            print_table(table)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folder, git revision or DVC experiment.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write to a .html, .md or .json file.")] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare other data, mteb versions or instructions, and say so.")
    ] = False,
) -> None:
    """Compare the students of runs, the first with every other: scores with paired intervals, params, time."""
    from pipeline.compare.comparison import compare_runs
    from pipeline.compare.render import render, to_dict
    from pipeline.compare.runs import open_run
    from pipeline.core.bootstrap import BootstrapParams
    from pipeline.core.errors import ParamsError
    from pipeline.core.files import to_json, write_bytes

    if len(runs) < 2:
        raise ParamsError(f"{len(runs)} given: give two or more", argument="runs")
    if len(set(runs)) < len(runs):
        raise ParamsError(f"{', '.join(runs)}: one is named twice", argument="runs")
    chosen, settings = comparison_format(output), BootstrapParams()
    found = compare_runs([open_run(name) for name in runs], settings, allow_different=allow_different)
    text = to_json(to_dict(found)) if chosen == "json" else render(found, chosen, settings)
    if output is None:
        print(text)
    else:
        write_bytes(output, text.encode())
        print(output)


def comparison_format(output: Path | None) -> str:
    """The format of a comparison by the file that it goes to; raises ParamsError about another ending."""
    from pipeline.core.errors import ParamsError

    formats = {".html": "html", ".md": "markdown", ".json": "json"}
    suffix = ".md" if output is None else output.suffix
    if suffix not in formats:
        raise ParamsError(f"'{output}' must end in {', '.join(formats)}", argument="output")
    return formats[suffix]
