"""generate: data/queries -> data/responses, the backbone's own answers

python -m pipeline.generate [--params params.yaml]
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core import artifacts
from pipeline.core import schemas as contracts
from pipeline.core.artifacts import Artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR
from pipeline.core.row_store import ShardStore
from pipeline.core.run import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.generate.engines import prepare_environment
from pipeline.generate.generator import answer_content, make_generator, rows_per_part
from pipeline.generate.outcomes import STORE, ResponseCounts
from pipeline.generate.params import GenerateParams

log = logging.getLogger(__name__)

WINDOW_ROWS = 4096  # prompts are sorted by length within so many


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    generate: GenerateParams


def read_ids(queries: Artifact) -> pa.Array:
    """The ids of all splits, sorted.

    Raises:
        ContractError: an id occurs twice.
    """
    ids = queries.read(columns=["id"]).sort_by("id").column("id")
    contracts.check_ids(ids, str(queries.path))
    return ids.combine_chunks()


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Answer all queries and write the responses.

    Raises:
        ArtifactError: the queries are missing or damaged.
        BackboneError: the backbone cannot be used.
        EngineError: the engine broke, or too many rows failed.
        WorkError: the disk is full, or another process does the same work.
    """
    params = inputs.generate
    prepare_environment(params.engine)
    queries = artifacts.open_artifact(QUERIES_DIR, "queries")
    ids = read_ids(queries)
    identity = identify(inputs.backbone.name, inputs.backbone.revision)
    content = answer_content(inputs.backbone, params)
    with ShardStore(work_dir("generate"), STORE, {"backbone": identity, **content}) as store:
        generator = make_generator(inputs.backbone, params, store)
        generator.run(ids, queries.batches(["id", "text"], WINDOW_ROWS))
        parts = generator.tables(ids, rows_per_part(params.max_new_tokens))
        counts = _write(parts, content, {"backbone": identity}, queries)
    log.info("responses: %s", counts.summary())
    stub = {"stub": "answers are the prompts themselves"} if content["generate"]["stub"] else {}
    facts.update(
        engine=params.engine,
        counts=counts.summary(),
        histograms=counts.histograms(),
        **generator.facts.summary(),
        **stub,
    )


def _write(parts: Any, content: dict[str, Any], models: dict[str, Any], queries: Artifact) -> ResponseCounts:
    counts = ResponseCounts()
    with artifacts.create(RESPONSES_DIR, kind="responses", params=content, models=models, inputs=[queries]) as out:
        out.write_parts(map(_checked, counts.through(parts)), contracts.RESPONSES)
        out.counts = counts.summary()
    return counts


def _checked(table: pa.Table) -> pa.Table:
    contracts.check_table(table, contracts.RESPONSES, str(RESPONSES_DIR))
    return table


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Let the backbone answer the queries."""
    setup_logging()
    with user_errors(), record("generate") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
