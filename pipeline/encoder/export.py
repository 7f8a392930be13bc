"""Write the finished encoder: trained tensors, config, the tokenizer of its backbone, a model card."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pipeline.artifacts import ArtifactWriter, write_json
from pipeline.encoder.config import EncoderConfig
from pipeline.encoder.inference import ADAPTER, CONFIG_FILE, WEIGHTS_FILE
from pipeline.encoder.lora import save_adapter
from pipeline.encoder.student import Student
from pipeline.errors import TrainingError

_CARD = """\
---
library_name: llm2vec-gen-pipeline
pipeline_tag: sentence-similarity
tags: [embeddings, llm2vec-gen]
---
# Encoder of {backbone}

An embedding of this model encodes what `{backbone}` would answer to the input (LLM2Vec-Gen). The backbone is frozen
and not in this folder; `student.safetensors` holds the {parameters:,} trained parameters: {tokens} new tokens and two
linear layers. {adapted}Embeddings have {width} dimensions, are not normalised, and are compared by cosine.

| | |
|---|---|
| backbone | {backbone_identity} |
| teacher of the targets | {teacher} |
| training rows | {rows:,} queries, answered by the backbone itself |
| input template | {template}, at most {max_query_tokens} tokens |
| optimiser steps | {steps:,} |

Use it with `python -m pipeline encode --model DIR --input FILE --output OUT.npy`. It can be no safer and know no more
than the backbone's own answers; queries in other languages or domains than the training queries were not seen.
"""


_ADAPTED = """\
`adapter/` holds LoRA adapters of rank {rank} with {parameters:,} parameters, under which the backbone embeds; answers
that embeddings decode to come from the backbone without them. """


def write_encoder(
    out: ArtifactWriter,
    student: Student,
    tokenizer: Any,
    config: EncoderConfig,
    *,
    rows: int,
    steps: int,
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill an artifact folder with everything that `Encoder.load` reads.

    `adapter` holds the trained parameters of `config.lora` (`adapter_parameters`); None or empty without one.

    Raises:
        TrainingError: there are adapters and no `config.lora`, or the other way round.
    """
    if bool(adapter) != (config.lora is not None):
        raise TrainingError(f"train.lora is {config.lora}, and the encoder has {len(adapter or {})} adapter tensors")
    tensors = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    save_file(tensors, out.path / WEIGHTS_FILE, {"format": "pt"})
    write_json(out.path / CONFIG_FILE, config.model_dump())
    tokenizer.save_pretrained(out.path)
    adapted = ""
    if config.lora is not None and adapter is not None:
        save_adapter(adapter, out.path / ADAPTER, config.lora, config.backbone["name"])
        count = sum(value.numel() for value in adapter.values())
        adapted = _ADAPTED.format(rank=config.lora.rank, parameters=count)
    card = _CARD.format(
        backbone=config.backbone["name"],
        backbone_identity=", ".join(f"{key} `{value}`" for key, value in config.backbone.items()),
        parameters=sum(value.numel() for value in tensors.values()),
        tokens=config.compression_tokens + config.thought_tokens,
        width=config.width,
        adapted=adapted,
        teacher=", ".join(f"{key} `{value}`" for key, value in config.teacher.items()),
        rows=rows,
        template=config.template,
        max_query_tokens=config.max_query_tokens,
        steps=steps,
    )
    (out.path / "README.md").write_text(card, encoding="utf-8")
