"""embed: data/responses -> data/targets, the teacher's embeddings of the responses

python -m pipeline.stages.embed [--params params.yaml]
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import pyarrow as pa
import typer

from pipeline import artifacts, contracts
from pipeline.artifacts import Artifact
from pipeline.backbone import BackboneParams
from pipeline.errors import TeacherError
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.runtime import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.shards import ShardStore, lock_folder
from pipeline.target_statistics import TargetStatistics
from pipeline.targets import (
    CHUNK_BATCHES,
    COLUMNS,
    Embedder,
    EmbedParams,
    Responses,
    fingerprint,
    rows_per_part,
    store_schema,
)
from pipeline.teachers.parallel import ParallelTeacher, open_teacher

log = logging.getLogger(__name__)

RESPONSES_DIR = Path("data/responses")
TARGETS_DIR = Path("data/targets")
BATCH_ROWS = 4096


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
    artifact = artifacts.open_artifact(RESPONSES_DIR, "responses")
    responses = Responses(lambda: artifact.batches([*COLUMNS], BATCH_ROWS))
    check_any(responses, artifact)
    with lock_work():  # before minutes are spent on loading a teacher
        _embed(inputs, responses, artifact, facts)


def _embed(inputs: Inputs, responses: Responses, artifact: Artifact, facts: RunRecord) -> None:
    params = inputs.embed
    started = monotonic()
    with open_teacher(params.teacher, inputs.backbone, params.data_parallel) as teacher:
        startup_seconds = monotonic() - started
        content = fingerprint(teacher, params)
        with ShardStore(work_dir("embed"), store_schema(teacher.width, params.dtype), content) as store:
            processes = teacher.processes if isinstance(teacher, ParallelTeacher) else 1
            chunk_rows = params.teacher.batch_size * CHUNK_BATCHES * processes
            embedder = Embedder(store, teacher, params.normalize, params.dtype, chunk_rows)
            embedder.run(responses)
            statistics = _write(embedder, responses, content, params, artifact)
    counts = _counts(statistics, responses)
    log.info("targets: %s, lengths %s", counts, statistics.norms())
    facts.update(
        teacher=teacher.identity,
        counts=counts,
        histograms={"tokens": statistics.tokens.summary()},
        startup_seconds=round(startup_seconds, 2),
        **embedder.summary(),
        width=teacher.width,
        **statistics.norms(),
    )


@contextlib.contextmanager
def lock_work() -> Iterator[None]:
    """Raises WorkError if another process embeds in this workspace."""
    folder = work_dir("embed")
    with artifacts.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.release()


def check_any(responses: Responses, artifact: Artifact) -> None:
    """Raises TeacherError if not one response has an answer."""
    if next(iter(responses), None) is None:
        raise TeacherError(f"{artifact.path} holds no usable response to embed: {dict(responses.skipped)}")


def _write(
    embedder: Embedder, responses: Responses, content: dict[str, Any], params: EmbedParams, artifact: Artifact
) -> TargetStatistics:
    statistics, width = TargetStatistics(), embedder.teacher.width
    schema = contracts.targets_schema(width, params.dtype)
    params_of_rows = {key: value for key, value in content.items() if key != "teacher"}
    models = {"teacher": content["teacher"]}
    parts = embedder.tables(responses, rows_per_part(width, params.dtype))
    with artifacts.create(TARGETS_DIR, kind="targets", params=params_of_rows, models=models, inputs=[artifact]) as out:
        out.write_parts((_checked(table, schema) for table in statistics.through(parts)), schema)
        out.counts = _counts(statistics, responses)
    return statistics


def _counts(statistics: TargetStatistics, responses: Responses) -> dict[str, Any]:
    return {
        "embedded": statistics.rows,
        "truncated_responses": statistics.truncated,
        "skipped": dict(responses.skipped),
    }


def _checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    contracts.check_table(table, schema, str(TARGETS_DIR))
    return table


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Let the teacher embed the responses."""
    setup_logging()
    with user_errors(), record("embed") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
