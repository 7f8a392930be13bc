"""Checks of a training run before it starts, for `python -m pipeline params`: memory of a step, targets that fit."""

from dataclasses import replace

from pipeline.backbone.loading import DType
from pipeline.backbone.sizes import ModelSizes
from pipeline.embed.params import EmbedParams
from pipeline.encoder.folder.config import check_decorrelated, check_form
from pipeline.optim.memory import OVERHEAD, PassTokens, StepMemory, StepSettings, largest, lora_sizes, step_memory
from pipeline.parallel.devices import visible_gpus
from pipeline.train.params import TrainParams

GB = 1e9


def check_response_form(train: TrainParams, embed: EmbedParams) -> None:
    """Raises TrainingError as the stage would, if a reading cannot be added to predictions of these targets as asked.

    The transform `auto` may turn out to be none, which only the stage sees.
    """
    transform = embed.transform
    kind = {"kind": "standardize" if transform.kind == "auto" else transform.kind + ", rotated" * transform.rotate}
    teacher = embed.teacher.model_dump()
    check_form(train.response_form, teacher, kind, mapped=embed.queries)
    if train.decorrelate_reading:
        decorrelated = transform.decorrelate > 0
        check_decorrelated(train.response_form, teacher, kind, decorrelated=decorrelated, mapped=embed.queries)


def gpu_bytes() -> int | None:
    """Memory of the smallest visible GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return min(int(torch.cuda.get_device_properties(at).total_memory) for at in range(torch.cuda.device_count()))


def step_settings(train: TrainParams, dtype: DType) -> StepSettings:
    """The settings of a step that decide its memory."""
    lora = train.lora
    return StepSettings(
        dtype=dtype,
        compression_tokens=train.compression_tokens,
        thought_tokens=train.thought_tokens,
        packed=train.passes.packed,
        frozen_prefix=train.passes.frozen_prefix,
        fused_cross_entropy=train.passes.fused_cross_entropy,
        checkpoint_responses=train.passes.checkpoint_responses,
        # The kernels that `auto` may choose keep more: the estimate stays an upper bound.
        recompute_attention=train.passes.packed and train.passes.attention == "segments",
        quantize=train.quantize,
        lora=None if lora is None else lora_sizes(lora),
        shards=_processes(train) if train.shard_backbone else 1,
        # The estimate is one for a GPU, where packed passes have them.
        fused_kernels=train.passes.packed,
        recompute_gates=0.0 if train.passes.checkpoint_responses else train.passes.recompute_gates,
    )


def _processes(train: TrainParams) -> int:
    return max(1, len(visible_gpus())) if train.processes == "auto" else train.processes


def pass_tokens(train: TrainParams, count: int) -> PassTokens:
    """The costliest forward pass of `count` rows, or of `count` tokens if the params set a token budget."""
    if train.max_tokens_per_batch is None:
        return PassTokens.full(count, train.max_query_tokens, train.max_response_tokens)
    extra = train.extra_tokens
    most_rows = -(-train.batch_size // _processes(train))
    return PassTokens.worst(count, most_rows, train.max_query_tokens, train.max_response_tokens, extra)


def train_memory(sizes: ModelSizes, dtype: DType, train: TrainParams, count: int) -> StepMemory:
    """Peak memory of a training step on one device with `count` rows, or tokens, in a forward pass."""
    return step_memory(sizes, pass_tokens(train, count), step_settings(train, dtype))


def memory_line(train: TrainParams, dtype: DType, sizes: ModelSizes) -> str:
    """Peak memory of a step and its parts, in words; of `auto` for as many rows as fit on the smallest visible GPU."""
    tokens, rows = train.max_tokens_per_batch, train.pass_rows(_processes(train))
    limit = gpu_bytes() if _is_auto(train) else None
    if limit is not None:
        rows = _largest_count(sizes, train, step_settings(train, dtype), limit) or 1
    found = train_memory(sizes, dtype, train, tokens or rows)
    activations = found.prefix + found.activations + found.workspace
    parts = {"weights": found.weights, "activations": activations, "logits": found.logits, "optimizer": found.optimizer}
    shown = ", ".join(f"{name} {part / GB:.1f}" for name, part in parts.items() if part)
    batch = f"{tokens:,} tokens" if tokens else f"{rows} row{'s' if rows > 1 else ''} of full length"
    return f"{'auto, ' if _is_auto(train) else ''}{batch} at a time: at most {found.total / GB:.1f} GB ({shown})"


def memory_remarks(train: TrainParams, dtype: DType, sizes: ModelSizes) -> list[str]:
    """The largest batches that fit on the smallest visible GPU, if these params do not; of `auto`, if one row does not.

    A batch that does not fit is halved when the stage runs.
    """
    count = 1 if _is_auto(train) else train.max_tokens_per_batch or train.pass_rows(1)
    limit, needed = gpu_bytes(), train_memory(sizes, dtype, train, count).total + OVERHEAD
    if limit is None or needed <= limit:
        return []
    budget = f"train.{'max_tokens_per_batch' if train.max_tokens_per_batch else 'micro_batch_size'}"
    settings = step_settings(train, dtype)
    changes = {
        "with train.passes.checkpoint_responses": replace(settings, checkpoint_responses=True, recompute_gates=0.0),
        "with train.quantize 4bit": replace(settings, quantize="4bit"),
    }
    ways = {budget: settings, **{way: changed for way, changed in changes.items() if changed != settings}}
    counts = {way: _largest_count(sizes, train, changed, limit) for way, changed in ways.items()}
    fits = [f"{way}: {'none' if found is None else f'{found:,}'}" for way, found in counts.items()]
    taken = f"train takes up to {needed / GB:.1f} GB, the GPU has {limit / GB:.1f} GB"
    return [f"{taken}. The largest that fits, {', '.join(fits)}"]


def _is_auto(train: TrainParams) -> bool:
    return train.micro_batch_size == "auto" and train.max_tokens_per_batch is None


def _largest_count(sizes: ModelSizes, train: TrainParams, settings: StepSettings, limit: int) -> int | None:
    row = train.max_query_tokens + train.max_response_tokens + settings.extra_tokens
    end = train.pass_rows(_processes(train)) if _is_auto(train) else train.batch_size
    if train.max_tokens_per_batch:
        end = train.batch_size * row
    return largest(lambda count: step_memory(sizes, pass_tokens(train, count), settings), limit, end)
