"""embed: data/responses -> data/targets, the teacher's embeddings of the responses

`embed.transform` is fitted on the responses to training queries (data/queries).

python -m pipeline.embed [--params params.yaml]
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import pyarrow as pa
import typer

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams
from pipeline.core import artifacts
from pipeline.core.artifacts import Artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TeacherError, section
from pipeline.core.gates import check_gates, warn_of_gates
from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR, TEACHER_DIR, TRAIN_TABLE
from pipeline.core.row_store import ShardStore, locked
from pipeline.core.run import RunRecord, device_memory, prepare_process, progress, record, user_errors, work_dir
from pipeline.core.schemas import check_table, targets_schema
from pipeline.core.vectors import Anisotropy
from pipeline.embed.params import EmbedParams, TargetGates
from pipeline.embed.statistics import CAUSES, TargetStatistics
from pipeline.embed.targets import (
    CHUNK_BATCHES,
    CHUNK_TEXTS,
    COLUMNS,
    Embedder,
    Finish,
    UsableResponses,
    among,
    fingerprint,
    rows_per_part,
    store_schema,
    target_params,
)
from pipeline.embed.teachers.pool import ParallelTeacher, open_teacher
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.embed.transform_fit import Fitted, fit_transform
from pipeline.optim.batching import CHARACTERS_PER_TOKEN, token_budget

log = logging.getLogger(__name__)

BATCH_ROWS = 4096
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
    read = {"responses": artifacts.open_artifact(RESPONSES_DIR, "responses")}
    if inputs.embed.transform.kind != "none":
        read["queries"] = artifacts.open_artifact(QUERIES_DIR, "queries")
    if TEACHERS[inputs.embed.teacher.kind].trained_here:
        read["teacher"] = artifacts.open_artifact(TEACHER_DIR, "teacher")
    responses = UsableResponses(lambda: read["responses"].batches([*COLUMNS], BATCH_ROWS))
    if next(iter(responses), None) is None:
        raise TeacherError(f"{RESPONSES_DIR} holds no usable response to embed: {dict(responses.skipped)}")
    with locked(work_dir("embed")):  # before minutes are spent on loading a teacher
        _embed(inputs, responses, read, facts)


def _embed(inputs: Inputs, responses: UsableResponses, read: Mapping[str, Artifact], facts: RunRecord) -> None:
    params = inputs.embed
    started = monotonic()
    with open_teacher(params.teacher, inputs.backbone, params.data_parallel) as teacher:
        startup_seconds = monotonic() - started
        with ShardStore(work_dir("embed"), store_schema(teacher.width), fingerprint(teacher)) as store:
            processes = teacher.processes if isinstance(teacher, ParallelTeacher) else 1
            tokens = CHUNK_BATCHES * token_budget(params.teacher.batch_tokens, best_device()) * processes
            look = partial(_warn, params.gates)
            embedder = Embedder(store, teacher, CHUNK_TEXTS * processes, tokens * CHARACTERS_PER_TOKEN, look)
            embedder.run(responses)
            fitted = _fit(embedder, responses, read["queries"], params) if "queries" in read else None
            finish = Finish(params.normalize, params.dtype, fitted.transform if fitted else None)
            counts, statistics = _write(embedder, responses, finish, params, read.values())
    log.info("targets: %s, lengths %s, anisotropy %s", counts, statistics.norms(), statistics.anisotropy.value)
    facts.update(
        teacher=teacher.identity,
        counts=counts,
        histograms={"tokens": statistics.tokens.summary()},
        startup_seconds=round(startup_seconds, 2),
        **embedder.summary(),
        width=embedder.teacher.width if fitted is None else fitted.transform.width,
        **statistics.norms(),
        anisotropy=statistics.anisotropy.value,
        gates={name: round(value, 6) for name, value in statistics.measures().items()},
        transform=fitted.facts if fitted else {"kind": "none"},
    )


def _fit(embedder: Embedder, responses: UsableResponses, queries: Artifact, params: EmbedParams) -> Fitted:
    """Fit `embed.transform` on the stored vectors of responses to training queries."""
    raw = Finish(params.normalize, params.dtype)
    before = Anisotropy()

    def blocks() -> Iterator[Any]:
        batches = queries.batches(["id"], BATCH_ROWS, TRAIN_TABLE)
        trained_on = chain.from_iterable(batch["id"].to_pylist() for batch in batches)
        tables = embedder.tables(among(responses, trained_on), BATCH_ROWS)
        for table in progress(tables, total=None, desc="fit transform", unit="block"):
            vectors = raw.vectors(table)
            before.add(vectors)
            yield vectors

    fitted = fit_transform(params.transform, blocks(), unit_length=params.normalize)
    fitted.facts["anisotropy_before"] = before.value
    log.info("embed.transform: %s", fitted.facts)
    return fitted


def _write(
    embedder: Embedder, responses: UsableResponses, finish: Finish, params: EmbedParams, inputs_read: Iterable[Artifact]
) -> tuple[dict[str, Any], TargetStatistics]:
    """Write the targets; returns their counts, also those of the manifest, and their statistics."""
    transform = finish.transform
    width = embedder.teacher.width if transform is None else transform.width
    statistics, schema = TargetStatistics(), targets_schema(width, params.dtype)
    rows = rows_per_part(max(width, embedder.teacher.width), params.dtype)
    tables = statistics.through(map(finish, embedder.tables(responses, rows)))
    models, made_with = {"teacher": embedder.teacher.identity}, target_params(params)
    with artifacts.create(TARGETS_DIR, kind="targets", params=made_with, models=models, inputs=inputs_read) as out:
        out.write_parts((check_table(table, schema, str(TARGETS_DIR)) for table in tables), schema)
        if transform is not None:
            transform.save(out.path)
        counts = {"embedded": statistics.rows, "truncated_responses": statistics.truncated}
        out.counts = {**counts, "skipped": dict(responses.skipped)}
        check_gates(params.gates, statistics.measures(), CAUSES, TeacherError)
    return out.counts, statistics


def _warn(gates: TargetGates, rows: pa.Table) -> None:
    statistics = TargetStatistics()
    deque(statistics.through([rows]), maxlen=0)
    warn_of_gates("embed", gates, statistics.measures(), CAUSES)


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Let the teacher embed the responses."""
    prepare_process()
    with user_errors(), device_memory(*MEMORY_PARAMS), record("embed") as facts, section("embed"):
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
