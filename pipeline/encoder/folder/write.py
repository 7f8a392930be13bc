"""Write an encoder folder: trained tensors, config, the tokenizer of its backbone, files for sentence-transformers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.backbone.lora import save_adapter
from pipeline.core.artifacts import ArtifactWriter
from pipeline.core.errors import TrainingError
from pipeline.core.files import write_json
from pipeline.encoder.folder.card import CARD_FILE, TrainingFacts, model_card
from pipeline.encoder.folder.config import (
    ADAPTER,
    CONFIG_FILE,
    READING_FILE,
    START_FILE,
    WEIGHTS_FILE,
    EncoderConfig,
)
from pipeline.encoder.folder.st_files import write_st_files
from pipeline.encoder.folder.tensors import write_tensors
from pipeline.encoder.folder.tokenizer import save_tokenizer
from pipeline.encoder.head import Reading
from pipeline.encoder.student import Student


def write_encoder(
    out: ArtifactWriter,
    student: Student,
    tokenizer: Any,
    config: EncoderConfig,
    *,
    rows: int,
    steps: int,
    adapter: Mapping[str, Tensor] | None = None,
    reading: Reading | None = None,
    start: Mapping[str, Tensor] | None = None,
    sources: Mapping[str, int] | None = None,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Fill an artifact folder with everything that `read_encoder` reads.

    Rows, optimiser steps, training queries by source and resolved params by section go into the model card. `start` is
    of `start_tensors`; an encoder that was not trained here has neither that nor a reading.

    Raises:
        TrainingError: there are adapters (see `adapter_parameters`) without `config.lora`, or the reverse.
    """
    if bool(adapter) != (config.lora is not None):
        raise TrainingError(
            f"config.lora is {config.lora}, with {len(adapter or {})} adapter tensors", argument="adapter"
        )
    tensors = student.state_dict()
    write_tensors(out.path / WEIGHTS_FILE, tensors)
    if reading is not None:
        write_tensors(out.path / READING_FILE, reading.tensors())
    if start is not None:
        write_tensors(out.path / START_FILE, start)
    write_json(out.path / CONFIG_FILE, config.model_dump())
    save_tokenizer(tokenizer, out.path)
    if config.lora is not None and adapter is not None:
        save_adapter(adapter, out.path / ADAPTER, config.lora, config.backbone["name"])
    write_st_files(out.path, lora=config.lora is not None)
    card = model_card(
        config,
        TrainingFacts(rows, steps, sources or {}, params or {}),
        parameters=_count(tensors),
        adapter_parameters=_count(adapter or {}),
    )
    (out.path / CARD_FILE).write_text(card, encoding="utf-8")


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())
