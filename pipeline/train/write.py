"""What a finished run leaves: the encoder folder, the curves, the facts of the record."""

import csv
import io
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.backbone.loading import BackboneParams
from pipeline.core.artifacts import Artifact, create
from pipeline.core.files import write_bytes
from pipeline.core.paths import ENCODER_DIR, HELDOUT_CURVE, LOSS_CURVE
from pipeline.core.target_transform import TRANSFORM_FILE, load_transform
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.folder.write import write_encoder
from pipeline.encoder.head import Reading
from pipeline.train.params import TrainParams
from pipeline.train.trainer import Trainer

_LOSSES = ("step", "loss", "align", "recon", "learning_rate")
_SCORES = ("step", "cosine", "top1", "mrr", "recon")


def write_run(
    trainer: Trainer,
    params: TrainParams,
    backbone: BackboneParams,
    identity: dict[str, str],
    tokenizer: Any,
    artifacts: Sequence[Artifact],
    reading: Reading,
) -> None:
    """Write the encoder and the curves of a trainer that has run.

    `artifacts` are queries, responses and targets, `reading` is of the trained student.
    """
    queries, _, targets = artifacts
    teacher = targets.manifest.models["teacher"]
    transform = load_transform(targets.path)
    config = EncoderConfig(
        backbone=identity,
        chat_template_kwargs=backbone.chat_template_kwargs,
        template=params.template,
        max_query_tokens=params.max_query_tokens,
        keep=params.keep,
        pool=params.pool,
        compression_tokens=params.compression_tokens,
        thought_tokens=params.thought_tokens,
        hidden=trainer.student.hidden,
        width=trainer.student.width,
        teacher=teacher,
        transform=transform.identity if transform else None,
        response_share=params.response_share,
        response_form=params.response_form,
        decorrelate_reading=params.decorrelate_reading,
        lora=params.lora,
    )
    sections = {"train": params.model_dump(), "backbone": backbone.model_dump()}
    models = {"backbone": identity, "teacher": teacher}
    with create(ENCODER_DIR, kind="encoder", params=sections, models=models, inputs=artifacts) as out:
        if transform is not None:
            shutil.copyfile(targets.path / TRANSFORM_FILE, out.path / TRANSFORM_FILE)
        write_encoder(
            out,
            trainer.student,
            tokenizer,
            config,
            rows=len(trainer.rows),
            steps=len(trainer.curve),
            adapter=trainer.adapter,
            reading=reading,
            start=trainer.start,
            sources={name: counts["train"] for name, counts in queries.manifest.counts.items() if name != "all"},
            params=sections,
        )
    _write_csv(LOSS_CURVE, _LOSSES, trainer.curve)
    _write_csv(HELDOUT_CURVE, _SCORES, trainer.validation.curve if trainer.validation else [])


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{key: f"{row[key]:.6g}" for key in columns[1:]}} for row in rows)
    write_bytes(path, text.getvalue().encode())


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """The facts of a run for its record."""
    processes = trainer.accelerator.num_processes
    facts: dict[str, Any] = {
        "rows": len(trainer.rows),
        "steps": len(trainer.curve),
        "processes": processes,
        "forward_pass": vars(trainer.limits),
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
    return {**facts, "training": trainer.throughput.summary(processes)}


def _losses(step: dict[str, float]) -> dict[str, float]:
    return {key: step[key] for key in ("loss", "align", "recon") if math.isfinite(step[key])}
