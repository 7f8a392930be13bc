"""Stage embed: data/responses -> data/targets, the teacher's embeddings. `python -m pipeline.embed`.

`embed.queries` adds the embeddings of the queries, and `embed.transform` is fitted on the responses to training
queries: both read data/queries.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from heapq import merge
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from pipeline.backbone.loading import BackboneParams
from pipeline.core.artifacts import PIECES, Artifact, create, open_artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TeacherError, section
from pipeline.core.gates import check_gates
from pipeline.core.paths import (
    HELDOUT_TABLE,
    QUERIES_DIR,
    RESPONSES_DIR,
    TARGETS_DIR,
    TEACHER_DIR,
    TRAIN_TABLE,
)
from pipeline.core.row_store import ShardStore, locked
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.core.schemas import SAMPLES, check_table, samples_of, targets_schema
from pipeline.core.tracking import tracking
from pipeline.embed.build import BATCH_ROWS, make_embedder, make_finish
from pipeline.embed.params import EmbedParams
from pipeline.embed.statistics import CAUSES, TargetStatistics
from pipeline.embed.targets import (
    COLUMNS,
    Embedder,
    Finish,
    QueriesOf,
    UsableResponses,
    fingerprint,
    rows_per_part,
    store_schema,
    target_params,
)
from pipeline.embed.teachers.pool import open_teacher
from pipeline.embed.teachers.registry import TEACHERS

log = logging.getLogger(__name__)

# What to lower where the memory of a device is full.
MEMORY_PARAMS = ("embed.teacher.batch_tokens",)


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    embed: EmbedParams


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Embed the usable responses and write the targets.

    Raises:
        ArtifactError: the responses are missing or damaged.
        BackboneError: the backbone, as the teacher, cannot be used.
        TeacherError: the teacher cannot be loaded or gives unusable embeddings, or there is nothing to embed.
        WorkError: the disk is full, or another process does the same work.
    """
    read = {"responses": open_artifact(RESPONSES_DIR, "responses")}
    if inputs.embed.queries or inputs.embed.transform.kind != "none":
        read["queries"] = open_artifact(QUERIES_DIR, "queries")
    if TEACHERS[inputs.embed.teacher.kind].trained_here:
        read["teacher"] = open_artifact(TEACHER_DIR, "teacher")
    samples = samples_of(read["responses"].manifest.params)
    columns = [*COLUMNS, SAMPLES.name] if samples > 1 else [*COLUMNS]
    responses = UsableResponses(lambda: read["responses"].batches(columns, BATCH_ROWS), samples)
    queries = QueriesOf(responses, lambda: _texts(read["queries"])) if inputs.embed.queries else None
    if next(iter(responses), None) is None:
        raise TeacherError(f"{RESPONSES_DIR} holds no usable response to embed: {dict(responses.skipped)}")
    with locked(work_dir("embed")):  # before minutes are spent on loading a teacher
        _embed(inputs, responses, queries, read, facts)


def _embed(
    inputs: Inputs,
    responses: UsableResponses,
    queries: QueriesOf | None,
    read: Mapping[str, Artifact],
    facts: RunRecord,
) -> None:
    params = inputs.embed
    started = monotonic()
    with open_teacher(params.teacher, inputs.backbone, params.data_parallel) as teacher:
        startup_seconds = monotonic() - started
        with (
            ShardStore(work_dir("embed"), store_schema(teacher.width), fingerprint(teacher)) as store,
            tracking(params.track, "embed", resume=len(store) > 0) as log_progress,
        ):
            embedder = make_embedder(store, teacher, params, log_progress)
            embedder.run(responses, *([] if queries is None else [queries]))
            finish, transform_facts = make_finish(embedder, responses, _trained_on(read), params)
            counts, statistics = _write(embedder, responses, queries, finish, params, read.values())
    log.info("targets: %s, lengths %s, anisotropy %s", counts, statistics.norms(), statistics.anisotropy.value)
    facts.update(
        teacher=teacher.identity,
        counts=counts,
        histograms={"tokens": statistics.tokens.summary()},
        startup_seconds=round(startup_seconds, 2),
        **embedder.summary(),
        width=embedder.teacher.width if finish.transform is None else finish.transform.width,
        **statistics.norms(),
        anisotropy=statistics.anisotropy.value,
        gates={name: round(value, 6) for name, value in statistics.measures().items()},
        transform=transform_facts,
    )


def _trained_on(read: Mapping[str, Artifact]) -> Iterator[str]:
    """The ids of the training queries in order, if these are read."""
    batches = read["queries"].batches(["id"], BATCH_ROWS, TRAIN_TABLE) if "queries" in read else iter(())
    return chain.from_iterable(batch["id"].to_pylist() for batch in batches)


def _texts(queries: Artifact) -> Iterator[tuple[str, str]]:
    """Ids and texts of all queries, in the order of ids."""
    return merge(*(_pairs(queries, table) for table in (TRAIN_TABLE, HELDOUT_TABLE)))


def _pairs(queries: Artifact, table: str) -> Iterator[tuple[str, str]]:
    for batch in queries.batches(["id", "text"], BATCH_ROWS, table):
        yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _write(
    embedder: Embedder,
    responses: UsableResponses,
    queries: QueriesOf | None,
    finish: Finish,
    params: EmbedParams,
    inputs_read: Iterable[Artifact],
) -> tuple[dict[str, Any], TargetStatistics]:
    """Write the targets; returns their counts, also those of the manifest, and their statistics."""
    transform = finish.transform
    width = embedder.teacher.width if transform is None else transform.width
    statistics, schema = TargetStatistics(), targets_schema(width, params.dtype, queries=queries is not None)
    rows = rows_per_part(max(width, embedder.teacher.width) * (1 if queries is None else 2), params.dtype)
    held = -(-rows // (PIECES * responses.samples))
    stored = embedder.tables(responses, held)
    made = map(finish, stored) if queries is None else map(finish.beside, stored, embedder.tables(queries, held))
    tables = statistics.through(made)
    models, made_with = {"teacher": embedder.teacher.identity}, target_params(params)
    with create(TARGETS_DIR, kind="targets", params=made_with, models=models, inputs=inputs_read) as out:
        out.write_parts((check_table(table, schema, str(TARGETS_DIR)) for table in tables), schema, rows)
        if transform is not None:
            transform.save(out.path)
        counts = {"embedded": statistics.rows, "truncated_responses": statistics.truncated}
        counts |= {} if queries is None else {"truncated_queries": statistics.truncated_queries}
        out.counts = {**counts, "skipped": dict(responses.skipped)}
        check_gates(params.gates, statistics.measures(), CAUSES, TeacherError)
    return out.counts, statistics


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Let the teacher embed the responses."""
    prepare_process()
    with user_errors(), device_memory(*MEMORY_PARAMS), record("embed") as facts, section("embed"):
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
