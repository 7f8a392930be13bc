"""Stage train: compression tokens and projections on the frozen backbone -> models/encoder.

python -m pipeline.stages.train
"""

import csv
import io
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from pipeline.artifacts import Artifact, create, digest_of, file_sha256, open_artifact, write_bytes
from pipeline.backbone import BackboneParams, PromptFormatter, identify
from pipeline.errors import TrainingError
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.runtime import RESULTS, RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.training import Trainer, TrainParams, warm_start_student

log = logging.getLogger(__name__)

ENCODER = Path("models/encoder")
CURVE = RESULTS / "train" / "loss.csv"
_COLUMNS = ("step", "loss", "align", "recon", "learning_rate")


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
    from accelerate import Accelerator

    from pipeline.backbone import load_backbone, load_tokenizer
    from pipeline.encoder.packing import fast_passes
    from pipeline.encoder.passes import PlainPasses
    from pipeline.encoder.student import input_embeddings, new_student

    artifacts = [open_artifact(Path("data") / kind, kind) for kind in ("queries", "responses", "targets")]
    identity = _checked_identity(inputs.backbone, artifacts[1])
    accelerator = Accelerator()
    tokenizer = load_tokenizer(inputs.backbone)
    formatter = _formatter(inputs, tokenizer)
    rows = _rows(inputs, artifacts, tokenizer, formatter)
    backbone = load_backbone(inputs.backbone, accelerator.device)
    student = new_student(
        backbone,
        rows.width,
        compression_tokens=inputs.train.compression_tokens,
        thought_tokens=inputs.train.thought_tokens,
        seed=inputs.train.seed,
    )
    passes = fast_passes(backbone) if inputs.train.passes == "packed" else PlainPasses(backbone)
    trainer = Trainer(student, passes, rows, inputs.train, accelerator, _checkpoint_path(inputs, identity, artifacts))
    if not trainer.resume() and inputs.train.warm_start.enabled:
        words = input_embeddings(backbone).float().cpu().numpy()
        ridge = warm_start_student(student, passes, rows, inputs.train, words, formatter("").token_ids)
        run_record.update(warm_start_ridge=ridge)
    trainer.run()
    if accelerator.is_main_process:
        _write(inputs, trainer, tokenizer, identity, artifacts)
        run_record.update(**_summary(trainer))


def _checked_identity(params: BackboneParams, responses: Artifact) -> dict[str, str]:
    identity = identify(params.name, params.revision)
    wrote = responses.manifest.models.get("backbone")
    if wrote != identity:
        raise TrainingError(
            f"data/responses was written by {wrote}, backbone in params is {identity}: run generate and embed again"
        )
    return identity


def _formatter(inputs: Inputs, tokenizer: Any) -> PromptFormatter:
    train = inputs.train
    return PromptFormatter(tokenizer, train.template, train.max_query_tokens, inputs.backbone.chat_template_kwargs)


def _rows(inputs: Inputs, artifacts: list[Artifact], tokenizer: Any, formatter: PromptFormatter) -> Any:
    from pipeline.encoder.data import drop_loops, join, tokenize

    queries, responses, targets = artifacts
    table = join(queries.read("train.parquet"), responses.read(), targets.read())
    if inputs.train.drop_loops:
        joined, table = table.num_rows, drop_loops(table)
        log.info("train: %d of %d answers end in a repetition loop and are left out", joined - table.num_rows, joined)
    return tokenize(table, formatter, tokenizer, inputs.train.max_response_tokens)


def _checkpoint_path(inputs: Inputs, identity: dict[str, str], artifacts: list[Artifact]) -> Path:
    fingerprint = digest_of(
        {
            "code": _code_digest(),
            "train": inputs.train.model_dump(exclude={"checkpoint_every"}),
            "backbone": identity,
            "dtype": inputs.backbone.dtype,
            "inputs": [artifact.digest for artifact in artifacts],
        }
    )
    return work_dir("train") / fingerprint[:16] / "checkpoint"


def _code_digest() -> str:
    """A checkpoint is only good for the code that wrote it: an edited loss must not go on from the old one's end."""
    package = Path(__file__).resolve().parent.parent
    files = [package / "training.py", *sorted((package / "encoder").glob("*.py"))]
    return digest_of({file.name: file_sha256(file) for file in files})


def _write(
    inputs: Inputs, trainer: Trainer, tokenizer: Any, identity: dict[str, str], artifacts: list[Artifact]
) -> None:
    from pipeline.encoder.config import EncoderConfig
    from pipeline.encoder.export import write_encoder

    teacher = artifacts[2].manifest.models["teacher"]
    config = EncoderConfig(
        backbone=identity,
        chat_template_kwargs=inputs.backbone.chat_template_kwargs,
        template=inputs.train.template,
        max_query_tokens=inputs.train.max_query_tokens,
        compression_tokens=inputs.train.compression_tokens,
        thought_tokens=inputs.train.thought_tokens,
        hidden=trainer.student.hidden,
        width=trainer.student.width,
        teacher=teacher,
    )
    with create(
        ENCODER,
        kind="encoder",
        params={"train": inputs.train.model_dump(), "backbone": inputs.backbone.model_dump()},
        models={"backbone": identity, "teacher": teacher},
        inputs=artifacts,
    ) as out:
        write_encoder(out, trainer.student, tokenizer, config, rows=len(trainer.rows), steps=len(trainer.curve))
    _write_curve(trainer.curve)


def _write_curve(curve: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{key: f"{row[key]:.6g}" for key in _COLUMNS[1:]}} for row in curve)
    write_bytes(CURVE, text.getvalue().encode())


def _summary(trainer: Trainer) -> dict[str, Any]:
    first, last = trainer.curve[0], trainer.curve[-1]
    return {
        "rows": len(trainer.rows),
        "steps": len(trainer.curve),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.student.parameters()),
        "first_batch": {key: first[key] for key in ("loss", "align", "recon")},
        "last_batch": {key: last[key] for key in ("loss", "align", "recon")},
    }


def _is_main_process() -> bool:
    """Whether this is the only process or the first: the launchers of torch and accelerate number them in RANK."""
    return os.environ.get("RANK", "0") == "0"


def main(params: Path = typer.Option(PARAMS_FILE, help="The params file.")) -> None:
    """Train the compression tokens and the projections."""
    setup_logging()
    with user_errors():
        inputs = load(params, Inputs)
        with record("train") if _is_main_process() else nullcontext(RunRecord("train")) as run_record:
            run(inputs, run_record)


if __name__ == "__main__":
    typer.run(main)
