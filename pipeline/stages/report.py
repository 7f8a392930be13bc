"""Stage report: results and manifests -> results/report.html and results/report.md.

python -m pipeline.stages.report
"""

import logging
from pathlib import Path
from typing import Any

import typer

from pipeline.artifacts import write_bytes
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.report import ReportParams
from pipeline.report.content import gather
from pipeline.report.render import render_html, render_markdown
from pipeline.runtime import RESULTS, setup_logging, user_errors

log = logging.getLogger(__name__)


class Inputs(Params):
    """The sections that this stage reads; suites and probes as they are, which their own stages check."""

    report: ReportParams
    suites: dict[str, Any]
    probes: dict[str, Any]


def run(inputs: Inputs) -> None:
    """Write both pages. A missing piece is said on them, and is no error.

    Raises:
        WorkError: the disk is full.
    """
    content = gather(inputs.report.title, inputs.suites, inputs.probes)
    for line in content.missing:
        log.warning("missing from the report: %s", line)
    write_bytes(RESULTS / "report.html", render_html(content).encode())
    write_bytes(RESULTS / "report.md", render_markdown(content).encode())


def main(params: Path = typer.Option(PARAMS_FILE, help="The params file.")) -> None:
    """Write the report."""
    setup_logging()
    with user_errors():
        run(load(params, Inputs))


if __name__ == "__main__":
    typer.run(main)
