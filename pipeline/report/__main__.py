"""Stage report: results and manifests -> results/report.html and report.md. `python -m pipeline.report`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.core.config import PARAMS_FILE, EntryName, Params, load
from pipeline.core.files import write_bytes
from pipeline.core.paths import REPORT_PAGES
from pipeline.core.run import prepare_process, user_errors
from pipeline.report import ReportParams

if TYPE_CHECKING:
    from pipeline.report.sections import AuditOutcome

log = logging.getLogger(__name__)


class Inputs(Params):
    """The sections that this stage reads; other stages validate the suites and probes."""

    report: ReportParams
    suites: dict[EntryName, Any]
    probes: dict[EntryName, Any]


def run(inputs: Inputs, params: Path = PARAMS_FILE) -> None:
    """Write both pages. Missing pieces and findings of the audit are printed on them and are no errors.

    Raises ParamsError if the file of published figures is damaged.
    """
    from pipeline.report.content import gather
    from pipeline.report.render import render_html, render_markdown

    audit = _audit() if inputs.report.audit else None
    params_text = params.read_text(encoding="utf-8") if params.is_file() else ""
    content = gather(inputs.report.title, inputs.suites, inputs.probes, audit=audit, params=params_text)
    for line in content.missing:
        log.warning("missing from the report: %s", line)
    for page, text in zip(REPORT_PAGES, (render_html(content), render_markdown(content)), strict=True):
        write_bytes(page, text.encode())


def _audit() -> "AuditOutcome":
    from pipeline.report.sections import audit_workspace

    log.info("audit: reading every artifact (report.audit: false skips this)")
    outcome = audit_workspace(Path(), REPORT_PAGES)
    for line in outcome.lines:
        log.warning("audit: %s", line)
    log.info("audit: %s, after %.1f s", outcome.verdict, outcome.seconds)
    return outcome


def main(params: Path = typer.Option(PARAMS_FILE, help="The params file.")) -> None:
    """Write the report."""
    prepare_process()
    with user_errors():
        run(load(params, Inputs), params)


if __name__ == "__main__":
    typer.run(main)
