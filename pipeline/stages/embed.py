"""embed: data/responses -> data/targets, the teacher's embeddings of the responses

python -m pipeline.stages.embed [--params params.yaml]
"""

import logging
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from pipeline import artifacts, contracts
from pipeline.artifacts import Artifact
from pipeline.backbone import BackboneParams
from pipeline.errors import TeacherError
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.runtime import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.shards import ShardStore
from pipeline.targets import (
    CHUNK_BATCHES,
    Embedder,
    EmbedParams,
    NormStatistics,
    Usable,
    fingerprint,
    rows_per_part,
    usable_responses,
)
from pipeline.teachers import build_teacher

log = logging.getLogger(__name__)

RESPONSES_DIR = Path("data/responses")
TARGETS_DIR = Path("data/targets")


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    embed: EmbedParams


def read_usable(responses: Artifact) -> Usable:
    """The responses that have an answer.

    Raises:
        TeacherError: none has.
    """
    usable = usable_responses(responses.read(columns=["id", "response", "finish_reason"]))
    if not usable.texts:
        raise TeacherError(f"{responses.path} holds no usable response to embed: {usable.skipped}")
    return usable


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Embed the usable responses and write the targets.

    Raises:
        ArtifactError: the responses are missing or damaged.
        BackboneError: the backbone, as the teacher, cannot be used.
        TeacherError: the teacher cannot be loaded or gives unusable embeddings.
        WorkError: the disk is full, or another process does the same work.
    """
    params = inputs.embed
    responses = artifacts.open_artifact(RESPONSES_DIR, "responses")
    usable = read_usable(responses)
    teacher = build_teacher(params.teacher, inputs.backbone)
    schema = contracts.targets_schema(teacher.width, params.dtype)
    with ShardStore(work_dir("embed"), schema, fingerprint(teacher, params)) as store:
        chunk_rows = params.teacher.batch_size * CHUNK_BATCHES
        embedder = Embedder(store, teacher, params.normalize, params.dtype, chunk_rows)
        embedder.run(usable.texts)
        norms = _write(embedder, schema, params, responses, usable)
    counts = {"embedded": len(usable.texts), "skipped": usable.skipped}
    log.info("targets: %s, lengths %s", counts, norms.summary())
    facts.update(
        teacher=teacher.identity,
        counts=counts,
        reused_rows=len(usable.texts) - embedder.computed_rows,
        computed_rows=embedder.computed_rows,
        computed_texts=embedder.computed_texts,
        embed_seconds=round(embedder.seconds, 2),
        texts_per_second=round(embedder.computed_texts / embedder.seconds, 1) if embedder.computed_texts else 0.0,
        width=teacher.width,
        **norms.summary(),
    )


def _write(
    embedder: Embedder, schema: pa.Schema, params: EmbedParams, responses: Artifact, usable: Usable
) -> NormStatistics:
    norms, content = NormStatistics(), fingerprint(embedder.teacher, params)
    models = {"teacher": content.pop("teacher")}
    parts = embedder.tables(usable.texts, rows_per_part(embedder.teacher.width, params.dtype))
    with artifacts.create(TARGETS_DIR, kind="targets", params=content, models=models, inputs=[responses]) as out:
        out.write_parts(norms.through(_checked(table, schema) for table in parts), schema)
        out.counts = {"embedded": norms.rows, "skipped": usable.skipped}
    return norms


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
