"""Stage collect: sources -> data/queries/{train,heldout}.parquet and removed.jsonl. `python -m pipeline.collect`."""

import contextlib
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from pipeline.backbone.loading import BackboneParams
from pipeline.collect.corpus import Corpus
from pipeline.collect.params import CollectParams
from pipeline.collect.selection import check_counts, identities, readable_evaluation, select
from pipeline.collect.spill import scratch_folder
from pipeline.core.artifacts import create
from pipeline.core.config import PARAMS_FILE, EntryName, Params, load
from pipeline.core.errors import ParamsError, section
from pipeline.core.paths import QUERIES_DIR
from pipeline.core.run import RunRecord, prepare_process, record, user_errors, work_dir
from pipeline.tasks.suites import SuiteParams
from pipeline.tasks.texts import TextSource, find_texts

log = logging.getLogger(__name__)


class EvaluateFolder(Params, extra="ignore"):
    """The section `evaluate`, of which this stage reads one key."""

    local_dir: str


class Inputs(Params):
    """The sections of params.yaml that this stage reads; the last three only for collect.decontaminate."""

    backbone: BackboneParams
    collect: CollectParams
    evaluate: EvaluateFolder | None = None
    # Without a suite or a probe the report would fail hours later.
    suites: dict[EntryName, SuiteParams] = Field(default_factory=dict, min_length=1)
    probes: dict[EntryName, dict[str, Any]] = Field(default_factory=dict, min_length=1)


def evaluation_texts(inputs: Inputs) -> list[TextSource]:
    """The texts of all evaluations if `decontaminate` is on, else none.

    Raises ParamsError if params name no evaluation, SourceError if a task or folder does not exist.
    """
    if inputs.collect.decontaminate is None:
        return []
    if inputs.evaluate is None:
        raise ParamsError("evaluate.local_dir: missing, collect.decontaminate needs it")
    with readable_evaluation():
        texts = find_texts(inputs.suites, inputs.probes, Path(inputs.evaluate.local_dir))
    if not texts:
        raise ParamsError("suites and probes have no data to compare the queries with", argument="decontaminate")
    return texts


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Read, select and write the queries.

    Raises:
        SourceError: a source or evaluation text cannot be read, or a split is empty.
        BackboneError, ParamsError, WorkError: the tokenizer, the params or the disk cannot be used.
    """
    params, backbone = inputs.collect, inputs.backbone
    evaluation = evaluation_texts(inputs)
    compared = params.decontaminate is not None or params.near_duplicates is not None
    with (
        scratch_folder(work_dir("collect")) as scratch,
        contextlib.closing(Corpus(scratch, params.sources, compared=compared)) as corpus,
    ):
        select(corpus, params, backbone, evaluation)
        counts = corpus.counts()
        log.info("queries: %s", ", ".join(f"{name} {rows}" for name, rows in counts["all"].items() if rows))
        check_counts(counts["all"], params)
        models = identities(params, backbone, evaluation)
        content, digests = params.model_dump(), corpus.source_digests
        with create(QUERIES_DIR, kind="queries", params=content, models=models, sources=digests) as out:
            corpus.write(out)
    rate = round(counts["all"]["read"] / max(sum(corpus.seconds.values()), 0.01), 1)
    facts.update(counts=counts, phase_seconds=corpus.seconds, rows_per_s=rate)


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Collect the queries of all sources."""
    prepare_process()
    with user_errors("collect keeps nothing, run it again from the start"), record("collect") as facts:
        inputs = load(params, Inputs)
        with section("collect"):
            run(inputs, facts)


if __name__ == "__main__":
    app()
