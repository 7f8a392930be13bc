"""Stage train: compression tokens and projections on the frozen backbone -> models/encoder.

python -m pipeline.train                                         as many processes as train.processes says
accelerate launch --multi_gpu --num_processes 8 -m pipeline.train    those of a launcher
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pipeline.backbone.loading import BackboneParams, identify, same_model
from pipeline.core.artifacts import Artifact, open_artifact
from pipeline.core.code_digest import code_digest
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TrainingError, section
from pipeline.core.files import digest_of
from pipeline.core.paths import HELDOUT_TABLE, QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR, TRAIN_TABLE
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.core.tracking import tracking
from pipeline.parallel.launch import launch_ranks
from pipeline.parallel.ranks import is_first, launched, rank_count, rank_process
from pipeline.train.params import TrainParams, check_instructions

if TYPE_CHECKING:
    from pipeline.core.target_transform import TransformParams

# For processes that wait while the first one reads a large backbone from a slow disk; NCCL gives up after 10 minutes.
PATIENCE = timedelta(hours=2)
# Modules that decide a training step with all they import: an edit there voids a checkpoint.
STEP_CODE = ("pipeline.train.build",)
# What to lower where the memory of a device is full.
MEMORY_PARAMS = ("train.micro_batch_size", "train.max_tokens_per_batch")


class Inputs(Params):
    """The sections that this stage reads."""

    backbone: BackboneParams
    train: TrainParams


def run(inputs: Inputs, run_record: RunRecord) -> None:
    """Train, or resume training, and write the encoder.

    Raises:
        TrainingError: the artifacts do not belong together, or training fails.
        BackboneError: the backbone cannot be loaded or cannot do what the params ask.
        ArtifactError: an input is missing or damaged.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    from pipeline.backbone.device import best_device
    from pipeline.backbone.loading import load_tokenizer
    from pipeline.train.build import assemble, query_formatter, read_rows
    from pipeline.train.reading import fit_reading
    from pipeline.train.refit import refit_alignment
    from pipeline.train.write import run_facts, write_run

    params, backbone = inputs.train, inputs.backbone
    on_cpu = best_device() == "cpu"  # accelerate goes to the CPU in silence where a GPU is not usable
    artifacts = [open_artifact(path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR)]
    identity = _checked_identity(backbone, artifacts[1])
    reading_transform = _reading_transform(params, artifacts[2])
    check_instructions(params, artifacts[0].manifest.params.get("sources", []))
    tokenizer = load_tokenizer(backbone)
    formatter = query_formatter(params, backbone, tokenizer)
    rows = read_rows(params, artifacts, TRAIN_TABLE, tokenizer, formatter)
    has_heldout = artifacts[0].read(HELDOUT_TABLE, ["id"]).num_rows > 0
    trainer = assemble(
        params,
        backbone,
        tokenizer,
        rows,
        read_rows(params, artifacts, HELDOUT_TABLE, tokenizer, formatter) if has_heldout else None,
        accelerator=Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]),
        checkpoint=_checkpoint_path(inputs, identity, artifacts),
        frame_ids=formatter("").token_ids,
        identity=identity,
        reading_transform=reading_transform,
    )
    first = trainer.accelerator.is_main_process
    with tracking(params.track if first else None, "train", resume=bool(trainer.curve)) as trainer.track:
        trainer.run()
    if params.refit_alignment:
        refit_alignment(trainer)
    reading = fit_reading(trainer)
    if first:
        write_run(trainer, params, backbone, identity, tokenizer, artifacts, reading)
        run_record.update(**run_facts(trainer))


def _checked_identity(params: BackboneParams, responses: Artifact) -> dict[str, str]:
    identity = identify(params.name, params.revision)
    wrote = responses.manifest.models.get("backbone", {})
    if not same_model(wrote, identity):
        raise TrainingError(
            f"{RESPONSES_DIR} was written by {wrote}, the backbone is {identity}: run generate and embed again"
        )
    return identity


def _reading_transform(params: TrainParams, targets: Artifact) -> "TransformParams | None":
    """How the reading is decorrelated: as targets that are one of the backbone's are. None if it is not.

    Raises TrainingError if a reading cannot be added, or decorrelated, as the params say.
    """
    from pipeline.core.target_transform import DECORRELATE, TransformParams, load_transform
    from pipeline.encoder.folder.config import check_decorrelated, check_form, in_reading_space

    transform, made_with = load_transform(targets.path), targets.manifest.params
    identity, mapped = transform.identity if transform else None, made_with.get("queries", False)
    teacher = targets.manifest.models["teacher"]
    check_form(params.response_form, teacher, identity, mapped=mapped)
    if not params.decorrelate_reading:
        return None
    decorrelated = transform is not None and not transform.diagonal
    check_decorrelated(params.response_form, teacher, identity, decorrelated=decorrelated, mapped=mapped)
    if decorrelated and in_reading_space(teacher, identity):
        return TransformParams.model_validate(made_with["transform"])
    return DECORRELATE


def _checkpoint_path(inputs: Inputs, identity: dict[str, str], artifacts: Sequence[Artifact]) -> Path:
    fingerprint = digest_of(
        {
            "code": code_digest(STEP_CODE),
            "train": inputs.train.trajectory(),
            "backbone": identity,
            "dtype": inputs.backbone.dtype,
            "chat_template_kwargs": inputs.backbone.chat_template_kwargs,
            "inputs": [artifact.digest for artifact in artifacts],
        }
    )
    return work_dir("train") / fingerprint[:16] / "checkpoint"


def main(params: Path = typer.Option(PARAMS_FILE, help="The params file.")) -> None:
    """Train the compression tokens and the projections."""
    prepare_process()
    with user_errors(), rank_process(), section("train"), device_memory(*MEMORY_PARAMS):
        inputs = load(params, Inputs)
        count = 1 if launched() else rank_count(inputs.train.processes, inputs.train.batch_size)
        if count > 1:
            launch_ranks("pipeline.train", sys.argv[1:], count)
            return
        with record("train") if is_first() else nullcontext(RunRecord("train")) as run_record:
            run(inputs, run_record)


if __name__ == "__main__":
    typer.run(main)
