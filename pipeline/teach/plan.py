"""Memory of a step of each phase, on paper: from the backbone's sizes, as `pipeline.optim.memory` says it, whose
terms these are. An upper bound for rows of full length, computed and not measured.

Of a token in a layer autograd keeps what training keeps of a padded row, the adapters' inputs, and what dropout keeps:

    LoRA's dropout       i (+ 4 i)    a mask of one byte a number, each map; maps of one input share no float32 input
    attention's          h T (2 b + 1)    weights, what is left of them, and the mask, of T tokens a row; a kernel that
                                      draws them again keeps less

On a CPU masks are numbers of the activations' size.
"""

from dataclasses import replace

from pipeline.backbone.sizes import ModelSizes
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
# Of a dropped number, on a GPU.
MASK = 1


def phase_memory(teach: TeachParams, phase: MntpParams | SimcseParams, shape: ModelSizes) -> StepMemory:
    """The most that a step of a phase holds at once on one device, without `OVERHEAD`."""
    settings = StepSettings(dtype=teach.dtype, packed=False, lora=lora_sizes(phase.lora))
    rows = min(phase.micro_batch_size, phase.batch_size)
    if isinstance(phase, SimcseParams) and rows == phase.batch_size:
        rows *= 2  # the graphs of both readings are kept
    tokens = PassTokens.full(rows, phase.max_tokens, 0)
    layer = layer_bytes(shape, settings) + adapter_bytes(shape, settings) + _dropped(phase, shape, settings)
    each = shape.layers * layer + once_bytes(shape, settings) + mask_bytes(shape, phase.max_tokens, settings)
    memory = StepMemory(
        weights=weight_bytes(shape, settings),
        optimizer=TRAINED * adapter_parameters(shape, settings),
        activations=tokens.query * each,
    )
    if isinstance(phase, SimcseParams):
        return memory
    hidden = round(tokens.query * phase.mask_fraction)
    logits = min(chunk_positions(shape.vocabulary), hidden) * FUSED_LOGIT * shape.vocabulary
    return replace(memory, logits=logits + 3 * hidden * settings.number * shape.hidden)


def _dropped(phase: MntpParams | SimcseParams, shape: ModelSizes, settings: StepSettings) -> int:
    """Bytes that dropout keeps of one token in one layer, on top of the adapters' inputs."""
    kept = 0
    if phase.lora.dropout:
        apart = adapter_bytes(shape, replace(settings, dtype="bfloat16")) - adapter_bytes(shape, settings)
        kept += MASK * adapter_widths(shape, settings) + apart
    if isinstance(phase, SimcseParams) and phase.dropout:
        kept += shape.heads * phase.max_tokens * (2 * settings.number + MASK)
    return kept


def teach_memory_line(teach: TeachParams, shape: ModelSizes) -> str:
    """What both phases take, in words."""
    phases: dict[str, MntpParams | SimcseParams] = {"MNTP": teach.mntp, "SimCSE": teach.simcse}
    told = (f"{name} {phase_memory(teach, phase, shape).total / GB:.1f} GB" for name, phase in phases.items())
    return f"{teach.dtype}, at most {', '.join(told)}"


def fitting_rows(teach: TeachParams, phase: MntpParams | SimcseParams, shape: ModelSizes, limit: float) -> int:
    """The power of two of texts of one forward pass, at most a batch, that fits into `limit` bytes; at least 1."""
    rows = largest(
        lambda count: phase_memory(teach, phase.model_copy(update={"micro_batch_size": count}), shape),
        int(limit),
        phase.batch_size,
    )
    return 1 << ((rows or 1).bit_length() - 1)
