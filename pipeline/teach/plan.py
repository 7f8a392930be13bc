"""Estimated memory of a step of each phase from the backbone's sizes, in the terms of `pipeline.optim.memory`.

An upper bound for rows of full length. Of a token in a layer autograd keeps what training keeps of a padded row, the
adapters' inputs, and for dropout:

    LoRA's dropout       i (+ 4 i)        a mask of one byte a number for each map; dropped inputs are not shared
    attention's          h T (2 b + 1)    weights, dropped weights and mask, of T tokens a row; a kernel that recomputes
                                          them keeps less

On a CPU masks are numbers of the activations' size.
"""

from dataclasses import replace

from pipeline.backbone.sizes import ModelSizes
from pipeline.optim.flops import read_flops
from pipeline.optim.memory import (
    FUSED_LOGIT,
    TRAINED,
    PassTokens,
    StepMemory,
    StepSettings,
    adapter_bytes,
    adapter_parameters,
    adapter_widths,
    chunk_positions,
    largest,
    layer_bytes,
    lora_sizes,
    mask_bytes,
    once_bytes,
    weight_bytes,
)
from pipeline.teach.params import MntpParams, SimcseParams, TeachParams

GB = 1e9
MASK = 1  # bytes of the dropout mask a number, on a GPU


def phase_memory(teach: TeachParams, phase: MntpParams | SimcseParams, sizes: ModelSizes) -> StepMemory:
    """Peak memory of a step of a phase on one device, without `OVERHEAD`."""
    settings = StepSettings(dtype=teach.dtype, packed=False, lora=lora_sizes(phase.lora))
    rows = min(phase.micro_batch_size, phase.batch_size)
    if isinstance(phase, SimcseParams) and rows == phase.batch_size:
        rows *= 2  # the graphs of both views are kept
    tokens = PassTokens.full(rows, phase.max_tokens, 0)
    layer = layer_bytes(sizes, settings) + adapter_bytes(sizes, settings) + _dropped(phase, sizes, settings)
    each = sizes.layers * layer + once_bytes(sizes, settings) + mask_bytes(sizes, phase.max_tokens, settings)
    memory = StepMemory(
        weights=weight_bytes(sizes, settings),
        optimizer=TRAINED * adapter_parameters(sizes, settings),
        activations=tokens.query * each,
    )
    if isinstance(phase, SimcseParams):
        return memory
    hidden = round(tokens.query * phase.mask_fraction)
    logits = min(chunk_positions(sizes.vocabulary), hidden) * FUSED_LOGIT * sizes.vocabulary
    return replace(memory, logits=logits + 3 * hidden * settings.number * sizes.hidden)


def _dropped(phase: MntpParams | SimcseParams, sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes that dropout keeps of one token in one layer, on top of the adapters' inputs."""
    total = 0
    if phase.lora.dropout:
        apart = adapter_bytes(sizes, replace(settings, dtype="bfloat16")) - adapter_bytes(sizes, settings)
        total += MASK * adapter_widths(sizes, settings) + apart
    if isinstance(phase, SimcseParams) and phase.dropout:
        total += sizes.heads * phase.max_tokens * (2 * settings.number + MASK)
    return total


def phase_flops(phase: MntpParams | SimcseParams, sizes: ModelSizes) -> float:
    """Operations of all steps of a phase, forward and backward through frozen weights; the adapters' are left out."""
    tokens = phase.steps * phase.batch_size * phase.max_tokens
    once = read_flops(sizes, tokens, phase.max_tokens)
    # Attention has no frozen operand: its backward pass costs twice what its forward pass does.
    both = 2 * once + tokens * 4 * sizes.layers * sizes.queries * phase.max_tokens
    if isinstance(phase, MntpParams):
        return both + tokens * phase.mask_fraction * 4 * sizes.hidden * sizes.vocabulary
    again = once if phase.micro_batch_size < phase.batch_size else 0
    return 2 * (both + again)  # two views of each text


def teach_memory_line(teach: TeachParams, sizes: ModelSizes) -> str:
    """The memory of both phases, for people."""
    phases: dict[str, MntpParams | SimcseParams] = {"MNTP": teach.mntp, "SimCSE": teach.simcse}
    peaks = (f"{name} {phase_memory(teach, phase, sizes).total / GB:.1f} GB" for name, phase in phases.items())
    return f"{teach.dtype}, at most {', '.join(peaks)}"


def fitting_rows(teach: TeachParams, phase: MntpParams | SimcseParams, sizes: ModelSizes, limit: float) -> int:
    """The largest power of two of texts a forward pass, at most a batch, that fits into `limit` bytes; at least 1."""
    rows = largest(
        lambda count: phase_memory(teach, phase.model_copy(update={"micro_batch_size": count}), sizes),
        int(limit),
        phase.batch_size,
    )
    return 1 << ((rows or 1).bit_length() - 1)
