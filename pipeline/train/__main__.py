"""Stage train: compression tokens and projections on the frozen backbone -> models/encoder.

python -m pipeline.train                                         as many processes as train.processes says
accelerate launch --multi_gpu --num_processes 8 -m pipeline.train    those of a launcher
"""

import csv
import io
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import Artifact, create, digest_of, open_artifact, write_bytes
from pipeline.core.code_digest import code_digest
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TrainingError, nested_in, section
from pipeline.core.paths import (
    ENCODER_DIR,
    HELDOUT_CURVE,
    HELDOUT_TABLE,
    LOSS_CURVE,
    QUERIES_DIR,
    RESPONSES_DIR,
    TARGETS_DIR,
    TRAIN_TABLE,
)
from pipeline.core.run import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.core.target_transform import TRANSFORM_FILE, load_transform
from pipeline.parallel.launch import launch_ranks
from pipeline.parallel.ranks import is_first, launched, rank_count, rank_process
from pipeline.train.params import TrainParams

if TYPE_CHECKING:
    from pipeline.train.data import TrainingRows
    from pipeline.train.trainer import Trainer

log = logging.getLogger(__name__)

# For processes that wait while the first one reads a large backbone from a slow disk; NCCL gives up after 10 minutes.
PATIENCE = timedelta(hours=2)
# Modules that decide a training step with all they import: an edit there voids a checkpoint.
STEP_CODE = ("pipeline.train.build", "pipeline.train.data")
_LOSSES = ("step", "loss", "align", "recon", "learning_rate")
_SCORES = ("step", "cosine", "top1", "mrr", "recon")


class Inputs(Params):
    """The sections that this stage reads."""

    backbone: BackboneParams
    train: TrainParams


def run(inputs: Inputs, run_record: RunRecord) -> None:
    """Train, or go on training, and write the encoder.

    Raises:
        TrainingError: the artifacts do not belong together, or training fails.
        BackboneError: the backbone cannot be loaded or cannot do what the params ask.
        ArtifactError: an input is missing or damaged.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    from pipeline.backbone.loading import load_tokenizer
    from pipeline.train.build import assemble

    artifacts = [open_artifact(path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR)]
    identity = _checked_identity(inputs.backbone, artifacts[1])
    tokenizer = load_tokenizer(inputs.backbone)
    formatter = _formatter(inputs, tokenizer)
    rows = _rows(inputs.train, artifacts, TRAIN_TABLE, tokenizer, formatter)
    heldout = _heldout(inputs.train, artifacts, tokenizer, formatter)
    trainer = assemble(
        inputs.train,
        inputs.backbone,
        tokenizer,
        rows,
        heldout,
        accelerator=Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]),
        checkpoint=_checkpoint_path(inputs, identity, artifacts),
        frame_ids=formatter("").token_ids,
    )
    trainer.run()
    if trainer.accelerator.is_main_process:
        _write(inputs, trainer, tokenizer, identity, artifacts)
        run_record.update(**_summary(trainer), training=_throughput(trainer))


def _checked_identity(params: BackboneParams, responses: Artifact) -> dict[str, str]:
    identity = identify(params.name, params.revision)
    wrote = responses.manifest.models.get("backbone")
    if wrote != identity:
        raise TrainingError(
            f"{RESPONSES_DIR} was written by {wrote}, backbone in params is {identity}: run generate and embed again"
        )
    return identity


def _formatter(inputs: Inputs, tokenizer: Any) -> PromptFormatter:
    train = inputs.train
    with nested_in(names={"max_tokens": "max_query_tokens"}):
        return PromptFormatter(
            tokenizer, train.template, train.max_query_tokens, inputs.backbone.chat_template_kwargs, train.keep
        )


def _rows(
    train: TrainParams, artifacts: Sequence[Artifact], split: str, tokenizer: Any, formatter: PromptFormatter
) -> "TrainingRows":
    from pipeline.train.data import drop_loops, join, tokenize

    queries, responses, targets = artifacts
    table = join(queries.read(split), responses.read(), targets.read())
    if train.drop_loops:
        joined, table = table.num_rows, drop_loops(table)
        log.info(
            "%s: %d of %d answers end in a repetition loop and are left out", split, joined - table.num_rows, joined
        )
    return tokenize(table, formatter, tokenizer, train.max_response_tokens, train.long_responses)


def _heldout(
    train: TrainParams, artifacts: Sequence[Artifact], tokenizer: Any, formatter: PromptFormatter
) -> "TrainingRows | None":
    """The held-out rows; None where the queries have none (collect.heldout_fraction 0)."""
    if not artifacts[0].read(HELDOUT_TABLE).num_rows:
        return None
    return _rows(train, artifacts, HELDOUT_TABLE, tokenizer, formatter)


def _checkpoint_path(inputs: Inputs, identity: dict[str, str], artifacts: Sequence[Artifact]) -> Path:
    fingerprint = digest_of(
        {
            "code": code_digest(STEP_CODE),
            "train": inputs.train.fixed(),
            "backbone": identity,
            "dtype": inputs.backbone.dtype,
            "inputs": [artifact.digest for artifact in artifacts],
        }
    )
    return work_dir("train") / fingerprint[:16] / "checkpoint"


def _write(
    inputs: Inputs, trainer: "Trainer", tokenizer: Any, identity: dict[str, str], artifacts: Sequence[Artifact]
) -> None:
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.folder.write import write_encoder

    teacher = artifacts[2].manifest.models["teacher"]
    transform = load_transform(artifacts[2].path)
    config = EncoderConfig(
        backbone=identity,
        chat_template_kwargs=inputs.backbone.chat_template_kwargs,
        template=inputs.train.template,
        max_query_tokens=inputs.train.max_query_tokens,
        keep=inputs.train.keep,
        compression_tokens=inputs.train.compression_tokens,
        thought_tokens=inputs.train.thought_tokens,
        hidden=trainer.student.hidden,
        width=trainer.student.width,
        teacher=teacher,
        transform=transform.identity if transform else None,
        lora=inputs.train.lora,
    )
    params = {"train": inputs.train.model_dump(), "backbone": inputs.backbone.model_dump()}
    with create(
        ENCODER_DIR,
        kind="encoder",
        params=params,
        models={"backbone": identity, "teacher": teacher},
        inputs=artifacts,
    ) as out:
        if transform is not None:
            shutil.copyfile(artifacts[2].path / TRANSFORM_FILE, out.path / TRANSFORM_FILE)
        write_encoder(
            out,
            trainer.student,
            tokenizer,
            config,
            rows=len(trainer.rows),
            steps=len(trainer.curve),
            adapter=trainer.adapter,
            sources={name: fates["train"] for name, fates in artifacts[0].manifest.counts.items() if name != "all"},
            params=params,
        )
    _write_csv(LOSS_CURVE, _LOSSES, trainer.curve)
    _write_csv(HELDOUT_CURVE, _SCORES, trainer.validation.curve if trainer.validation else [])


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{key: f"{row[key]:.6g}" for key in columns[1:]}} for row in rows)
    write_bytes(path, text.getvalue().encode())


def _summary(trainer: "Trainer") -> dict[str, Any]:
    facts: dict[str, Any] = {
        "rows": len(trainer.rows),
        "steps": len(trainer.curve),
        "processes": trainer.accelerator.num_processes,
        "trained_parameters": sum(parameter.numel() for parameter in trainer.trained.values()),
        "first_batch": _losses(trainer.curve[0]),
        "last_batch": _losses(trainer.curve[-1]),
        **trainer.facts,
    }
    if trainer.validation is not None:
        curve, best = trainer.validation.curve, trainer.validation.best
        facts |= {"heldout_first": curve[0], "heldout_last": curve[-1]}
        if best is not None:
            facts["heldout_best"] = next(row for row in curve if row["step"] == best.step)
    return facts


def _throughput(trainer: "Trainer") -> dict[str, Any]:
    return trainer.throughput.summary(trainer.accelerator.num_processes)


def _losses(step: dict[str, float]) -> dict[str, float]:
    return {key: step[key] for key in ("loss", "align", "recon") if math.isfinite(step[key])}


def main(params: Path = typer.Option(PARAMS_FILE, help="The params file.")) -> None:
    """Train the compression tokens and the projections."""
    setup_logging()
    with user_errors(), rank_process(), section("train"):
        inputs = load(params, Inputs)
        count = 1 if launched() else rank_count(inputs.train.processes, inputs.train.batch_size)
        if count > 1:
            launch_ranks("pipeline.train", sys.argv[1:], count)
            return
        with record("train") if is_first() else nullcontext(RunRecord("train")) as run_record:
            run(inputs, run_record)


if __name__ == "__main__":
    typer.run(main)
