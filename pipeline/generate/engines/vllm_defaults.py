"""vLLM's arguments that the machine decides, each with the reason for the log: arithmetic over memory sizes alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.backbone.loading import DTYPE_BYTES, DType
from pipeline.core.errors import EngineError

GIB = 2**30

# SmolLM2-135M on 2 cores: 64 rows at once gave a sixth less (docs/results-log.md).
CPU_SEQUENCES = 128
# The cache where the size of a row is not known from the backbone's config.
CPU_KV_CACHE_BYTES = GIB
# The CPU's attention kernels take multiples of this many tokens.
CPU_BLOCK_TOKENS = 32
# Share of the free memory; the weights and the activations need the rest.
CPU_KV_SHARE = 0.5

# Larger decode batches run outside vLLM's CUDA graphs.
GPU_SEQUENCES = 512
SMALL_GPU_SEQUENCES = 256
SMALL_GPU_BYTES = 40 * GIB
GPU_UTILIZATION = 0.9
# For the CUDA context of vLLM's process, which vLLM does not count.
GPU_MARGIN_BYTES = GIB
MIN_GPU_UTILIZATION = 0.05


class Choice(NamedTuple):
    """A value and why it was chosen."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Gpu:
    """The fullest of an engine's GPUs: bytes in all, and bytes that other processes leave free."""

    total: int
    free: int


def token_bytes(config: Any, dtype: DType) -> int | None:
    """Bytes of one token in the KV cache, or None if the text config lacks the sizes."""
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not (heads and layers and hidden):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return int(2 * layers * kv_heads * head_dim * DTYPE_BYTES[dtype])


def cpu_choices(
    per_token: int | None, max_model_len: int, free: int, sequences: int | None = None
) -> dict[str, Choice]:
    """The choices on a CPU with `free` bytes of memory for this engine.

    `per_token` is the bytes of a token in the KV cache (None: unknown), `max_model_len` the most tokens of a row,
    `sequences` the rows at once where the user set them.
    """
    choices = {
        "enforce_eager": Choice(True, "compiling takes minutes on a CPU"),
        "block_size": Choice(CPU_BLOCK_TOKENS, "the least that its kernels take, so shorter prefixes are shared"),
    }
    if per_token is None:
        choices["max_num_seqs"] = Choice(CPU_SEQUENCES, "more does not pay on a CPU")
        choices["kv_cache_memory_bytes"] = Choice(CPU_KV_CACHE_BYTES, "the size of a row is not in the config")
        return choices
    row = per_token * CPU_BLOCK_TOKENS * -(-max_model_len // CPU_BLOCK_TOKENS)
    limit = int(free * CPU_KV_SHARE)
    rows = sequences or CPU_SEQUENCES
    fitting = max(1, min(rows, limit // row))
    room = f"{free / GIB:.1f} GiB of memory are free"
    few = f"half of the memory holds the cache of that many full rows; {room}"
    choices["max_num_seqs"] = Choice(fitting, few if fitting < rows else "measured: more does not pay on a CPU")
    # One block more: vLLM keeps one for itself.
    size = fitting * row + per_token * CPU_BLOCK_TOKENS
    reason = f"{fitting} rows of {max_model_len} tokens, {per_token} bytes a token; {room}"
    return choices | {"kv_cache_memory_bytes": Choice(size, reason)}


def unseen_defaults(on_gpu: bool) -> dict[str, Any]:
    """The arguments for an engine on another machine, whose memory is not known here."""
    everywhere = {"enable_prefix_caching": True, "max_num_seqs": GPU_SEQUENCES if on_gpu else CPU_SEQUENCES}
    return everywhere | ({} if on_gpu else {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES})


def gpu_choices(gpu: Gpu | None, utilization: float | None = None) -> dict[str, Choice]:
    """The choices on a GPU (None: its memory is unknown); `utilization` is the user's share of its memory.

    Raises EngineError if other processes leave no memory on it.
    """
    if gpu is None:
        return {"max_num_seqs": Choice(SMALL_GPU_SEQUENCES, "the size of the GPU is not known")}
    if gpu.total >= SMALL_GPU_BYTES:
        seqs = Choice(GPU_SEQUENCES, "the largest batch in vLLM's CUDA graphs; it admits what its cache holds")
    else:
        seqs = Choice(SMALL_GPU_SEQUENCES, f"a GPU of {gpu.total / GIB:.0f} GiB; vLLM admits what its cache holds")
    if utilization is not None:
        return {"max_num_seqs": seqs}
    return {"max_num_seqs": seqs, "gpu_memory_utilization": _utilization(gpu)}


def _utilization(gpu: Gpu) -> Choice:
    possible = (gpu.free - GPU_MARGIN_BYTES) / gpu.total
    if possible >= GPU_UTILIZATION:
        return Choice(GPU_UTILIZATION, f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB are free")
    share = int(possible * 100) / 100
    memory = f"other processes use {(gpu.total - gpu.free) / GIB:.1f} of {gpu.total / GIB:.1f} GiB"
    if share < MIN_GPU_UTILIZATION:
        message = f"{memory} of the GPU, which leaves nothing for vLLM: stop them, or set CUDA_VISIBLE_DEVICES"
        raise EngineError(message, argument="options.gpu_memory_utilization")
    return Choice(share, f"{memory}; {GPU_MARGIN_BYTES // GIB} GiB stays free")
