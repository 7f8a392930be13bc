"""An encoder as a standard checkpoint for engines that run no code of this project: `python -m pipeline export-merged`.

The new tokens become rows of the embedding matrix, which the tokenizer appends to each text. The two projections, which
no activation separates, become one linear layer; at a response share below 1 it holds the reading too. The written
folder must embed as the encoder does before it appears.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone.loading import DType
from pipeline.backbone.lora import load_adapter
from pipeline.core.artifacts import check_new, create, read_manifest
from pipeline.core.errors import ArtifactError, TrainingError
from pipeline.encoder.folder.config import ADAPTER
from pipeline.encoder.folder.read import read_encoder
from pipeline.export.merged.folder import PROMPT_IS_CUT, MergedLayout, write_config, write_modules, write_readme
from pipeline.export.merged.tokenizer import PROBES, find_frame, fitting_probes, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

KIND = "merged"
SHARD_SIZE = "5GB"
# Largest relative difference of an embedding from the encoder's own, in float32.
LIMIT = 1e-4


class Merged(NamedTuple):
    """A written checkpoint.

    `difference` is the largest relative difference of an embedding from the encoder's, in float32 with rounded weights.
    """

    layout: MergedLayout
    difference: float


def export_merged(
    model: Path,
    out: Path,
    *,
    prompts: Mapping[str, str],
    dtype: DType = "float32",
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write the encoder folder `model` as a checkpoint of transformers, sentence-transformers and vLLM.

    Args:
        out: the folder to write; an earlier export there is replaced, anything else is refused.
        prompts: by name ("query", "document"), which sentence-transformers puts before a text unchanged.
        dtype: of the written weights; embeddings are compared before rounding to it and measured after.
        backbone: name or folder to use in place of the recorded one.
        trust_remote_code: let the backbone run code that comes with it; the code goes along into `out`.

    Raises:
        ArtifactError: `out` holds something else.
        TrainingError: `model` is no encoder, its tokenizer cannot append the tokens, or the embeddings differ.
        BackboneError: the backbone cannot be loaded.
    """
    _check_target(out)
    encoder = read_encoder(model, backbone=backbone, trust_remote_code=trust_remote_code)
    config = encoder.config
    frame = find_frame(encoder.tokenizer, config.template, config.chat_template_kwargs)
    probes = fitting_probes(encoder.tokenizer, frame, encoder.max_tokens)
    expected = encoder.encode(probes)
    if config.lora is not None:
        _merge_adapter(encoder.model, load_adapter(encoder.model, model / ADAPTER, config.lora))
    # After the matrix and after the tokenizer: some matrices are larger than their tokenizer, some smaller.
    first = max(len(encoder.model.get_input_embeddings().weight), len(encoder.tokenizer))
    layout = MergedLayout(
        first_id=first,
        thought_tokens=config.thought_tokens,
        compression_tokens=config.compression_tokens,
        hidden=config.hidden,
        width=encoder.width,
        max_tokens=config.max_query_tokens + config.thought_tokens + config.compression_tokens,
        keep=config.keep,
        ordered=config.ordered,
    )
    add_rows(encoder.model, encoder.student.tokens, first)
    weight, bias = (part.float().contiguous() for part in encoder.head.composed())
    with create(out, kind=KIND, params={"dtype": dtype}, models={"encoder": encoder.identity}) as writer:
        # The class of a tokenizer depends on the config in its folder.
        encoder.model.config.save_pretrained(writer.path)
        write_tokenizer(writer.path, encoder.tokenizer, frame, layout)
        write_modules(writer.path, layout, weight, bias, prompts, dtype)
        own_code = hasattr(encoder.model.config, "auto_map")
        write_readme(writer.path, layout, config, dtype, encoder.identity, prompts, own_code=own_code)
        difference = _largest_difference(_embed(writer.path, encoder.model, probes, layout, weight, bias), expected)
        if not difference <= LIMIT:
            by = f"{difference:.2g} (limit {LIMIT})"
            raise TrainingError(f"the merged checkpoint of {model} embeds differently from the encoder, by {by}")
        if dtype != "float32":
            _round(encoder.model, dtype)
            difference = _largest_difference(_embed(writer.path, encoder.model, probes, layout, weight, bias), expected)
        _save_model(encoder.model, layout, writer.path, dtype)
    return Merged(layout, difference)


def add_rows(model: Any, rows: "Tensor", first: int) -> None:
    """Store `rows` `[N, d]`, given as the first layer's input, at row `first` of the embedding matrix.

    All other new rows, and those of an output head of its own, are zero. Raises TrainingError if the embedding layer
    does more than scale its rows by one number.
    """
    import torch

    embeddings = model.get_input_embeddings()
    before, scale = len(embeddings.weight), _scale(embeddings)
    model.resize_token_embeddings(first + len(rows), mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head is not None:
            head.weight[before:] = 0
            if getattr(head, "bias", None) is not None:
                head.bias[before:] = 0
        weight = model.get_input_embeddings().weight
        weight[before:] = 0
        weight[first:] = (rows / scale).to(weight.dtype)


def _scale(embeddings: Any) -> float:
    """The factor that the embedding layer multiplies a row by: 1 in most models, the root of d in Gemma."""
    import torch

    with torch.no_grad():
        first_rows = embeddings.weight[:1024].double()
        row = int(first_rows.norm(dim=1).argmax())
        stored, output = first_rows[row], embeddings(torch.tensor([row], device=first_rows.device))[0].double()
        scale = float((stored @ output) / (stored @ stored))
        if not torch.allclose(output, scale * stored, rtol=0.02, atol=0.0):
            raise TrainingError("the backbone's embedding layer does more than scale its rows: no row can be added")
    return scale


def _merge_adapter(model: Any, adapted: Any) -> None:
    """Add the adapters' updates to the weights of `model`, which `adapted` shares."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                weight = model.get_submodule(name).weight
                weight += module.get_delta_weight("default").to(weight.dtype)


def _round(model: Any, dtype: DType) -> None:
    """Round the parameters but keep them in float32; buffers (RoPE angles) are not stored and stay exact."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))


def _save_model(model: Any, layout: MergedLayout, folder: Path, dtype: DType) -> None:
    import torch

    # A shared head has logits for the new rows, which must never be generated.
    model.generation_config.suppress_tokens = layout.new_ids
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    write_config(folder, layout, model.config)


def _embed(
    folder: Path, model: Any, texts: Sequence[str], layout: MergedLayout, weight: "Tensor", bias: "Tensor"
) -> "np.ndarray[Any, Any]":
    """Embeddings `[N, e]` by the written tokenizer, the grown model and the linear layer, one text at a time."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_cut(tokenizer, layout)
    pooled = []
    with torch.inference_mode():
        for ids in tokenizer(list(texts))["input_ids"]:
            row = torch.tensor([ids], device=weight.device)
            hidden = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state
            pooled.append(hidden[0, -layout.compression_tokens :].float().mean(dim=0))
        return (torch.stack(pooled) @ weight.T + bias).cpu().numpy()


def _check_cut(tokenizer: Any, layout: MergedLayout) -> None:
    """Raises TrainingError unless a truncated text keeps the appended tokens."""
    for length in (layout.max_tokens, None):
        [ids] = tokenizer([PROBES[0] * layout.max_tokens], truncation=True, max_length=length)["input_ids"]
        if len(ids) != layout.max_tokens or ids[-len(layout.new_ids) :] != layout.new_ids:
            expected = f"{layout.max_tokens} that end with {layout.new_ids[-3:]}"
            raise TrainingError(f"the tokenizer cuts a text to {len(ids)} tokens, end {ids[-3:]}, expected {expected}")


def _largest_difference(found: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> float:
    import numpy as np

    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def _check_target(out: Path) -> None:
    with suppress(ArtifactError):
        if read_manifest(out).manifest.kind == KIND:  # an earlier export
            return
    check_new(out)


def usage(out: Path, layout: MergedLayout) -> Sequence[str]:
    """How to load the checkpoint, in lines for a terminal."""
    lines = [f'SentenceTransformer("{out}").encode(texts)']
    if layout.compression_tokens == 1:
        lines.append(f'vLLM: LLM("{out}", runner="pooling", dtype="float32").embed(texts)')
    else:
        lines.append(f"vLLM: per-token pooling, mean of the last {layout.compression_tokens}, see {out}/README.md")
    if layout.keep == "end":
        lines.append(f"note: {PROMPT_IS_CUT[0].lower()}{PROMPT_IS_CUT[1:]}")
    return lines
