"""Encoder folders with random projections, tokens and adapters over a backbone folder."""

from pathlib import Path
from typing import Any

import torch

from pipeline.backbone.loading import BackboneParams, Keep, Pool, Template, identify, load_backbone, load_tokenizer
from pipeline.backbone.lora import LoraParams, adapter_parameters, add_adapter
from pipeline.core.artifacts import create
from pipeline.core.target_transform import TargetTransform
from pipeline.encoder.folder.config import EncoderConfig, ResponseForm
from pipeline.encoder.folder.tensors import start_tensors
from pipeline.encoder.folder.write import write_encoder
from pipeline.encoder.head import Reading
from pipeline.encoder.student import new_student


def write_folder(
    out: Path,
    backbone: Path,
    *,
    template: Template = "raw",
    compression_tokens: int = 3,
    thought_tokens: int = 2,
    max_query_tokens: int = 64,
    keep: Keep = "start",
    pool: Pool = "tokens",
    lora: LoraParams | None = None,
    width: int = 5,
    recorded: dict[str, str] | None = None,
    transform: TargetTransform | None = None,
    share: float = 1.0,
    form: ResponseForm = "beside",
    mapped: bool = False,
    decorrelated: bool = False,
    teacher: dict[str, Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **card: Any,
) -> Path:
    """Write the encoder folder `out`; `recorded` is the identity of the backbone that it names.

    `mapped`: its reading has a map to the teacher's space; `decorrelated`: one by which it counts as decorrelated.
    """
    params = BackboneParams(name=str(backbone), dtype="float32")
    model = load_backbone(params)
    student = new_student(model, width, compression_tokens=compression_tokens, thought_tokens=thought_tokens, seed=1)
    config = EncoderConfig(
        backbone=recorded or identify(str(backbone), None), template=template,
        chat_template_kwargs=chat_template_kwargs or {}, max_query_tokens=max_query_tokens, keep=keep,
        compression_tokens=compression_tokens, pool=pool,
        thought_tokens=thought_tokens, hidden=student.hidden, width=width, teacher=teacher or {"name": "t"}, lora=lora,
        transform=transform.identity if transform else None, response_share=share, response_form=form,
        decorrelate_reading=decorrelated,
    )  # fmt: skip
    adapter = adapter_parameters(add_adapter(model, **lora.model_dump(), seed=3)) if lora else None
    with torch.no_grad():
        for seed, (_, value) in enumerate(sorted((adapter or {}).items())):
            value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    features = torch.randn(20, student.hidden, generator=torch.Generator().manual_seed(5)) + 1
    reading = Reading.fit(student, features)
    if mapped or decorrelated:
        made = student.hidden if decorrelated else width
        draw = torch.randn(made, student.hidden + 1, generator=torch.Generator().manual_seed(6)).double()
        reading = reading.with_map(draw[:, 1:], draw[:, 0], features)
    joined = {"response_share": share, "response_form": form, "decorrelate_reading": decorrelated}
    sections = {"train": joined, "backbone": {"dtype": params.dtype}}
    untrained = new_student(model, width, compression_tokens=compression_tokens, thought_tokens=thought_tokens, seed=2)
    trained: dict[str, Any] = {"adapter": adapter, "reading": reading, "start": start_tensors(untrained, reading)}
    with create(out, kind="encoder", params=sections) as writer:
        facts: dict[str, Any] = {"rows": 7, "steps": 3, "params": sections}
        write_encoder(writer, student, load_tokenizer(params), config, **trained, **{**facts, **card})
        if transform is not None:
            transform.save(writer.path)
    return out
