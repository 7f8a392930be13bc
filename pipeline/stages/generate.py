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
from pipeline.generation import GenerateParams, Generator, rows_per_part
from pipeline.outcomes import STORE, ResponseCounts
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.runtime import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.shards import ShardStore

log = logging.getLogger(__name__)

QUERIES_DIR = Path("data/queries")
RESPONSES_DIR = Path("data/responses")
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
        tensor_parallel=params.tensor_parallel,
        data_parallel=params.data_parallel,
        batch_invariant=params.batch_invariant,
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
    queries = artifacts.open_artifact(QUERIES_DIR, "queries")
    ids = read_ids(queries)
    identity = identify(inputs.backbone.name, inputs.backbone.revision)
    content = {"generate": params.content(engine_facts(params.engine)), "chat_template_kwargs": kwargs}
    with ShardStore(work_dir("generate"), STORE, {"backbone": identity, **content}) as store:
        generator = make_generator(inputs, store)
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


def make_generator(inputs: Inputs, store: ShardStore) -> Generator:
    """The work of the params, its engine not loaded yet.

    Raises:
        BackboneError: the tokenizer cannot be used.
    """
    params = inputs.generate
    formatter = PromptFormatter(
        load_tokenizer(inputs.backbone),
        "chat",
        params.max_prompt_tokens,
        inputs.backbone.chat_template_kwargs,
        keep="end" if params.too_long == "keep_end" else "start",
    )
    return Generator(
        store=store,
        load_engine=lambda: load_engine(inputs),
        formatter=formatter,
        sampling=params.sampling,
        seed=params.seed,
        max_failed_fraction=params.max_failed_fraction,
        drop_too_long=params.too_long == "drop",
        strip_thinking=params.strip_thinking,
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
