"""A trainer from params: rows, the frozen backbone, the student on it, the passes, the held-out rows, the start."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.backbone.lora import adapter_parameters, add_adapter, check_adapter
from pipeline.backbone.prompting import PromptFormatter
from pipeline.backbone.sharding import load_sharded
from pipeline.backbone.sizes import sizes_from_config
from pipeline.core.artifacts import Artifact
from pipeline.core.errors import nested_in
from pipeline.core.run import work_dir
from pipeline.core.target_transform import TransformParams
from pipeline.encoder.folder.tensors import start_tensors
from pipeline.encoder.passes.adapted import AdaptedQueryPass
from pipeline.encoder.passes.plain import Passes
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import input_embeddings, new_student
from pipeline.encoder.token_init import token_init
from pipeline.train.data import TrainingRows, drop_loops, read_joined, tokenize
from pipeline.train.params import TrainParams
from pipeline.train.reading import fit_reading, reading_of, row_statistics
from pipeline.train.refine import refine_alignment
from pipeline.train.trainer import Trainer
from pipeline.train.validation import Validation
from pipeline.train.warm_start import Statistics, frame_rows, warm_start

log = logging.getLogger(__name__)


def query_formatter(params: TrainParams, backbone: BackboneParams, tokenizer: Any) -> PromptFormatter:
    """What makes a query the prompt that is trained on; raises BackboneError if the template cannot be used."""
    with nested_in(names={"max_tokens": "max_query_tokens"}):
        return PromptFormatter(
            tokenizer, params.template, params.max_query_tokens, backbone.chat_template_kwargs, params.keep
        )


def read_rows(
    params: TrainParams, artifacts: Sequence[Artifact], name: str, tokenizer: Any, formatter: PromptFormatter
) -> TrainingRows:
    """The rows of one table of the queries; `artifacts` are queries, responses and targets. Raises as `make_rows`."""
    queries, responses, targets = artifacts
    tables = read_joined(queries, responses, targets, name)
    return make_rows(params, tables, name, tokenizer, formatter, work_dir("train"))


def make_rows(
    params: TrainParams,
    tables: Iterable[pa.Table],
    name: str,
    tokenizer: Any,
    formatter: PromptFormatter,
    folder: Path,
) -> TrainingRows:
    """Joined tables tokenised into files in `folder`, which go with the process; `name` stands in the log.

    Raises TrainingError if the tables do not belong together, or no row can be trained on with these params.
    """
    return tokenize(
        drop_loops(tables, name) if params.drop_loops else tables,
        formatter,
        tokenizer,
        params.max_response_tokens,
        params.long_responses,
        params.pool,
        folder=folder,
    )


def assemble(
    params: TrainParams,
    backbone_params: BackboneParams,
    tokenizer: Any,
    rows: TrainingRows,
    heldout: TrainingRows | None,
    *,
    accelerator: Any,
    checkpoint: Path | None,
    frame_ids: Sequence[int],
    identity: Mapping[str, str] | None = None,
    reading_transform: TransformParams | None = None,
) -> Trainer:
    """A trainer that is ready to run: at its last checkpoint, or at its start.

    Args:
        params: section `train`; `backbone_params`: section `backbone`.
        heldout: to score on; None scores none.
        accelerator: device and processes.
        checkpoint: file of the resumable state; None keeps none.
        frame_ids: the prompt of an empty query, for the closed-form start.
        identity: of the backbone, by which hidden states of queries are kept on the disk; None keeps none.
        reading_transform: see `Trainer`.

    Raises:
        BackboneError: the backbone cannot be loaded or cannot do what the params ask.
        TrainingError: the params do not fit the data or the checkpoint.
    """
    if params.shard_backbone:
        with nested_in(names={"backbone": "shard_backbone"}):
            backbone = load_sharded(backbone_params, accelerator)
    else:
        backbone = load_backbone(backbone_params, accelerator.device, quantize=params.quantize)
    with nested_in("token_start"):
        start = token_init(params.token_start.kind, params.token_start.words, tokenizer)
    student = new_student(
        backbone,
        rows.width,
        compression_tokens=params.compression_tokens,
        thought_tokens=params.thought_tokens,
        seed=params.seed,
        start=start,
    )
    with nested_in("lora"):
        adapted = add_adapter(backbone, **params.lora.model_dump(), seed=params.seed) if params.lora else None
        if params.lora:
            check_adapter(adapted, params.lora.targets)
    with nested_in("passes"):
        passes = _passes(params, backbone, adapted)
    trainer = Trainer(
        student,
        passes,
        rows,
        params,
        accelerator,
        None if heldout is None else Validation(heldout.head(params.heldout.rows), params.heldout.select),
        {} if adapted is None else adapter_parameters(adapted),
        checkpoint,
        sizes_from_config(backbone.config.to_dict()),
        None if identity is None else {**identity, "dtype": str(backbone.dtype), "quantize": params.quantize},
        reading_transform=reading_transform,
    )
    if not trainer.resume():
        start_student(trainer, backbone, frame_ids)
    return trainer


def _passes(params: TrainParams, backbone: Any, adapted: Any) -> Passes:
    # Sharded layers are gathered in each pass, so all processes must run equally many, whatever their rows share.
    settings = {**params.passes.model_dump(), "share_prefix": not params.shard_backbone}
    passes = make_passes(backbone, **settings)
    if adapted is None:
        return passes
    # What a query's prefix computes depends on the adapter, which is trained.
    query_pass = make_passes(adapted, **{**settings, "frozen_prefix": False}).query_pass
    return Passes(AdaptedQueryPass(query_pass, adapted), passes.response_pass)


def start_student(trainer: Trainer, backbone: Any, frame_ids: Sequence[int]) -> None:
    """Give a trainer's student its start, in closed form if the params say so, and keep it with its reading."""
    if not trainer.params.warm_start.enabled:
        trainer.start = start_tensors(trainer.student, fit_reading(trainer))
        return
    statistics = row_statistics(trainer, trainer.params.warm_start.rows)
    if trainer.accelerator.is_main_process:
        warm_start_student(trainer, statistics, backbone, frame_ids)
    trainer.agree()
    if trainer.rows.query_targets is not None:
        trainer.start = start_tensors(trainer.student, fit_reading(trainer))
        return
    features, _ = statistics.scored_rows()
    trainer.start = start_tensors(trainer.student, reading_of(trainer, features))


def warm_start_student(trainer: Trainer, statistics: Statistics, backbone: Any, frame_ids: Sequence[int]) -> None:
    """Give a trainer's student its closed-form start; the ridge's strength becomes one of the trainer's facts."""
    student, params = trainer.student, trainer.params
    words = input_embeddings(backbone).float().cpu().numpy()
    frame = frame_rows(words, frame_ids, student.compression_tokens)
    norm = float(np.linalg.norm(words, axis=-1).mean())
    trainer.facts["warm_start_ridge"] = warm_start(student, statistics, frame, norm, params.warm_start.ridge)
    if params.refine:
        refine_alignment(student, statistics.scored_rows(), params.refine, seed=params.seed)
