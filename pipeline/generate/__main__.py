"""Stage generate: data/queries -> data/responses, the backbone's own answers. `python -m pipeline.generate`."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.backbone.prompting import check_instructions_stay
from pipeline.core.artifacts import PIECES, create, open_artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import EngineError, section
from pipeline.core.gates import check_gates
from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR
from pipeline.core.row_store import ShardStore
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.core.schemas import check_table, responses_schema
from pipeline.core.sorted_ids import sorted_ids
from pipeline.core.tracking import tracking
from pipeline.generate.engines.registry import ENGINES, prepare_environment
from pipeline.generate.generator import answer_content, make_generator, measured, rows_per_part
from pipeline.generate.params import GenerateParams
from pipeline.generate.response_counts import CAUSES, STORE, ResponseCounts

log = logging.getLogger(__name__)

WINDOW_ROWS = 4096  # prompts that are sorted by length together


class Inputs(Params):
    """The sections that this stage reads."""

    backbone: BackboneParams
    generate: GenerateParams


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Answer all queries and write the responses.

    Raises:
        ArtifactError: the queries are missing or damaged.
        BackboneError, EngineError: the backbone or the engine cannot be used, too many rows failed, or a gate did.
        WorkError: the disk is full, or another process does the same work.
    """
    params, counts = inputs.generate, ResponseCounts()
    prepare_environment(params.engine)
    queries = open_artifact(QUERIES_DIR, "queries")
    models = {"backbone": identify(inputs.backbone.name, inputs.backbone.revision)}
    content = answer_content(inputs.backbone, params)
    with section("generate"):
        check_instructions_stay(params.too_long, queries.manifest.params.get("sources", []))
    with (
        section("generate"),
        ShardStore(work_dir("generate"), STORE, {**models, **content}) as store,
        tracking(params.track, "generate", resume=len(store) > 0) as log_progress,
    ):
        generator = make_generator(inputs.backbone, params, store, log_progress)
        generator.run(partial(sorted_ids, queries), queries.batches(["id", "text"], WINDOW_ROWS))
        samples = params.samples_per_query
        schema, rows = responses_schema(samples), rows_per_part(params.max_new_tokens * samples)
        tables = counts.through(generator.tables(sorted_ids(queries), -(-rows // PIECES)))
        made_with = _manifest_params(content, samples)
        with create(RESPONSES_DIR, kind="responses", params=made_with, models=models, inputs=[queries]) as out:
            out.write_parts((check_table(table, schema, str(RESPONSES_DIR)) for table in tables), schema, rows)
            out.counts = counts.summary()
            log.info("responses: %s", counts.summary())
            facts.update(**_facts(params, counts), **generator.facts.summary())
            with facts.written_on_failure():
                check_gates(params.gates, measured(params, counts), CAUSES, EngineError)


def _facts(params: GenerateParams, counts: ResponseCounts) -> dict[str, Any]:
    stub = ENGINES[params.engine].stub
    facts = {"engine": params.engine, "counts": counts.summary(), "histograms": counts.histograms()}
    return {**facts, **({"stub": stub} if stub else {})}


def _manifest_params(content: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """What decides the responses: what decides an answer, and how many there are."""
    more = {"samples_per_query": samples} if samples > 1 else {}
    return {**content, "generate": content["generate"] | more}


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Let the backbone answer the queries."""
    prepare_process()
    with user_errors(), device_memory("generate.options.batch_size", expandable=False), record("generate") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
