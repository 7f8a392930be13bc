"""generate: data/queries -> data/responses, the backbone's own answers

python -m pipeline.stages.generate [--params params.yaml]
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

from pipeline import artifacts, contracts
from pipeline.artifacts import Artifact
from pipeline.backbone import BackboneParams, PromptFormatter, identify, load_tokenizer
from pipeline.engines import build_engine, engine_facts, prepare_environment
from pipeline.engines.base import Engine
from pipeline.generation import STORE, GenerateParams, Generator, ResponseCounts, rows_per_part
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.runtime import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.shards import ShardStore

log = logging.getLogger(__name__)

QUERIES_DIR = Path("data/queries")
RESPONSES_DIR = Path("data/responses")


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    generate: GenerateParams


def read_queries(artifact: Artifact) -> dict[str, str]:
    """Text by id, of all splits.

    Raises:
        ContractError: an id occurs twice.
    """
    table = artifact.read(columns=["id", "text"]).sort_by("id")
    contracts.check_ids(table.column("id"), str(artifact.path))
    return dict(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))


def load_engine(inputs: Inputs) -> Engine:
    """The engine of the params.

    Raises:
        EngineError: it cannot start.
    """
    params = inputs.generate
    return build_engine(
        params.engine,
        inputs.backbone,
        dtype=params.dtype,
        max_prompt_tokens=params.max_prompt_tokens,
        max_new_tokens=params.max_new_tokens,
        options=params.options,
    )


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Answer all queries and write the responses.

    Raises:
        ArtifactError: the queries are missing or damaged.
        BackboneError: the backbone cannot be used.
        EngineError: the engine broke, or too many rows failed.
        WorkError: the disk is full, or another process does the same work.
    """
    params, kwargs = inputs.generate, inputs.backbone.chat_template_kwargs
    prepare_environment(params.engine)
    queries_artifact = artifacts.open_artifact(QUERIES_DIR, "queries")
    queries = read_queries(queries_artifact)
    identity = identify(inputs.backbone.name, inputs.backbone.revision)
    content = {"generate": params.content(engine_facts(params.engine)), "chat_template_kwargs": kwargs}
    formatter = PromptFormatter(load_tokenizer(inputs.backbone), "chat", params.max_prompt_tokens, kwargs)
    with ShardStore(work_dir("generate"), STORE, {"backbone": identity, **content}) as store:
        generator = Generator(
            store=store,
            load_engine=lambda: load_engine(inputs),
            formatter=formatter,
            sampling=params.sampling,
            seed=params.seed,
            max_failed_fraction=params.max_failed_fraction,
        )
        generator.run(queries)
        parts = generator.tables(queries, rows_per_part(params.max_new_tokens))
        counts = _write(parts, content, {"backbone": identity}, queries_artifact)
    log.info("responses: %s", counts)
    stub = {"stub": "answers are the prompts themselves"} if content["generate"]["stub"] else {}
    facts.update(engine=params.engine, counts=counts, **generator.facts.summary(), **stub)


def _write(parts: Any, content: dict[str, Any], models: dict[str, Any], queries: Artifact) -> dict[str, Any]:
    counted = ResponseCounts()
    with artifacts.create(RESPONSES_DIR, kind="responses", params=content, models=models, inputs=[queries]) as out:
        out.write_parts(map(_checked, counted.through(parts)), contracts.RESPONSES)
        out.counts = counted.summary()
    return out.counts


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
