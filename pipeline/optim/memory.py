"""Peak memory of a training step, on paper: from the backbone's sizes and the tokens of one forward pass.

b bytes a number, d hidden, m feed-forward, q and k the widths of a token's queries and keys, h heads, L layers, V
vocabulary. What autograd keeps of a token in a layer whose weights are frozen:

    each norm            4 d + 4        its input in float32, whatever the dtype, and the root mean square
                         b d + 4        as a fused kernel (Gemma's norms never are)
    norms of the heads   4 (q + k + h + h_kv)   where the architecture has them (Qwen3, Gemma 3)
                         b (q + k) + 4 (h + h_kv)   as fused kernels
    attention            b (2 q + 2 k) + 4 h    queries, keys, values, output, and the log of the normaliser
                         b (q + 2 k)    where it is computed again, sequence by sequence: neither output nor normaliser
    feed-forward         3 b m          gate, its activation, and the other branch
                         2 b m          as a fused kernel: without the activation
                         b d            where that is computed again: its input
    frozen linear maps   nothing        the gradient of their input needs their weight only; sums keep nothing either
                         b (2 d + q + m)    as 8-bit maps of bitsandbytes, which keep their inputs all the same
    adapters (LoRA)      4 (i + r)      each: its input of width i in float32, and what it makes of it

A frozen prefix keeps 2 b k a token and layer (twice while the query pass runs: the cache, and what attention keeps).
With padding, keys and values are repeated to the width of the queries, and each layer keeps its own mask. Checkpointed
responses keep b d a token and layer, and one layer at a time in full. The fused cross-entropy holds 8 V bytes a
position of a chunk, the plain one 12 V for all positions. What is trained costs 16 bytes a number: itself, its gradient
and AdamW's two moments, all float32.

The kept bytes are those that torch reports (tests/optim/test_memory.py); what the CUDA context, the kernels'
workspaces and the allocator's fragments take comes on top: `OVERHEAD`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.backbone.loading import DTYPE_BYTES, DType, Quantize
from pipeline.backbone.lora import LoraParams
from pipeline.backbone.sizes import ModelSizes

# CUDA context, cuBLAS and attention workspaces, and fragments that the allocator cannot use.
OVERHEAD = 1_500_000_000
FLOAT32 = 4
# A trained number: itself, its gradient, AdamW's first and second moment.
TRAINED = 4 * FLOAT32
FUSED_LOGIT, PLAIN_LOGIT = 8, 12
# Bytes of a quantised weight; of 4-bit ones, with the scale of 64 of them, and the scale of 256 of those.
QUANTIZED: dict[Quantize, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
# Of the logits of a chunk in float32, where the chunk is chosen by the vocabulary (on a GPU).
CHUNK_BYTES = 256 * 2**20
# The linear maps of a layer, and what each reads.
_INPUTS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "output",
    "gate_proj": "feed-forward",
    "up_proj": "feed-forward",
    "down_proj": "product",
}
ALL_LINEAR = tuple(_INPUTS)


@dataclass(frozen=True)
class PassTokens:
    """Tokens of one forward pass, summed over its rows; the new tokens and the soft prompts not counted."""

    rows: int
    query: int
    response: int

    @classmethod
    def full(cls, rows: int, max_query: int, max_response: int) -> "PassTokens":
        return cls(rows, rows * max_query, rows * max_response)

    @classmethod
    def worst(cls, budget: int, most_rows: int, max_query: int, max_response: int, extra: int) -> "PassTokens":
        """The costliest pass of a token budget: responses of full length, next to no query.

        `budget` counts queries, responses and the `extra` tokens that every row adds (new ones and soft prompts); a
        longer row makes a pass of its own.
        """
        rows = min(most_rows, budget // (1 + max_response + extra))
        if rows < 2:
            return cls(1, max_query, max_response)
        return cls(rows, min(rows * max_query, budget - rows * (max_response + extra)), rows * max_response)


@dataclass(frozen=True)
class LoraSizes:
    rank: int
    targets: tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True)
class StepSettings:
    """How a step runs.

    Attributes:
        compression_tokens: n, also the soft prompts of a row.
        width: of the embedding; None: the backbone's hidden size.
        frozen_prefix: the query runs without autograd; never with `lora`.
        fused_cross_entropy: logits for `chunk` positions at a time; None: chosen by the vocabulary.
        checkpoint_responses: recompute the response pass, layer by layer.
        recompute_attention: packed attention keeps neither its output nor copies of the prefix.
        quantize: of the frozen linear maps.
        shards: processes that share the backbone's layers.
        fused_kernels: norms and gates as on a GPU (`backbone/fused.py`).
        recompute_gates: share of the layers whose fused gates are computed again in the response pass.
    """

    dtype: DType = "bfloat16"
    compression_tokens: int = 10
    thought_tokens: int = 0
    width: int | None = None
    packed: bool = True
    frozen_prefix: bool = True
    fused_cross_entropy: bool = True
    checkpoint_responses: bool = False
    recompute_attention: bool = False
    chunk: int | None = None
    quantize: Quantize | None = None
    lora: LoraSizes | None = None
    shards: int = 1
    fused_kernels: bool = False
    recompute_gates: float = 0.0

    @property
    def number(self) -> int:
        """b, bytes of an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def new_tokens(self) -> int:
        return self.thought_tokens + self.compression_tokens

    @property
    def extra_tokens(self) -> int:
        """What a row adds to its query and response: new tokens and soft prompts."""
        return self.new_tokens + self.compression_tokens

    @property
    def prefix_is_frozen(self) -> bool:
        return self.frozen_prefix and self.lora is None


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the moment of a step that takes most.

    Attributes:
        optimizer: trained tensors, their gradients and AdamW's moments.
        prefix: keys and values of the queries.
        activations: kept by autograd.
        workspace: what lives for one layer only.
    """

    weights: int
    optimizer: int
    prefix: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def step_memory(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> StepMemory:
    """The most that a step holds at once on one device, without `OVERHEAD`."""
    return max(moments(sizes, tokens, settings), key=lambda memory: memory.total)


def moments(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> list[StepMemory]:
    """Where a step may hold most: in the prefix, after the query pass, at the logits, at the start of backward."""
    base = StepMemory(weight_bytes(sizes, settings), TRAINED * trained_parameters(sizes, settings))
    graph = replace(
        base,
        prefix=prefix_bytes(sizes, tokens, settings),
        activations=query_bytes(sizes, tokens, settings) + response_bytes(sizes, tokens, settings),
    )
    cache = tokens.query * kv_bytes(sizes, settings.dtype) if settings.prefix_is_frozen else 0
    row = _response_row(tokens, settings)
    backward = _live_bytes(sizes, row, settings)
    if settings.checkpoint_responses:
        backward += row * layer_bytes(sizes, settings)
    return [
        replace(base, prefix=cache, workspace=_live_bytes(sizes, tokens.query, settings)),
        replace(
            base,
            prefix=graph.prefix + (0 if settings.recompute_attention else cache),
            activations=query_bytes(sizes, tokens, settings),
        ),
        replace(graph, logits=logit_bytes(sizes, tokens, settings)),
        replace(graph, workspace=backward),
    ]


def largest(cost: Callable[[int], StepMemory], limit: int, end: int) -> int | None:
    """The largest number up to `end` whose cost fits into `limit` bytes with `OVERHEAD`; None: not even 1 does."""
    return bisect_right(range(1, end + 1), limit, key=lambda number: cost(number).total + OVERHEAD) or None


def weight_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes of the frozen backbone on one device; embeddings and output head are never quantised."""
    each = QUANTIZED[settings.quantize] if settings.quantize else settings.number
    layer, embeddings = sizes.layer_parameters() * each, sizes.embedding_parameters() * settings.number
    if settings.shards == 1:
        return round(sizes.layers * layer + embeddings)
    # Embeddings and head are whole everywhere; the layer in use is gathered, and the next one on its way.
    return round(sizes.layers * layer / settings.shards + embeddings + 2 * layer)


def trained_parameters(sizes: ModelSizes, settings: StepSettings) -> int:
    """New tokens, reconstruction d -> d and alignment d -> width with their biases, and adapters."""
    projections = (sizes.hidden + 1) * (sizes.hidden + (settings.width or sizes.hidden))
    return settings.new_tokens * sizes.hidden + projections + adapter_parameters(sizes, settings)


def adapter_parameters(sizes: ModelSizes, settings: StepSettings) -> int:
    if settings.lora is None:
        return 0
    widths = _linear_widths(sizes)
    return sizes.layers * settings.lora.rank * sum(sum(widths[name]) for name in settings.lora.targets)


def kv_bytes(sizes: ModelSizes, dtype: DType) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * sizes.layers * sizes.keys * DTYPE_BYTES[dtype]


def layer_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes that autograd keeps of one token in one layer."""
    normed = settings.number if settings.fused_kernels and sizes.standard_norms else FLOAT32
    norms = sizes.norms * (normed * sizes.hidden + FLOAT32)
    if sizes.head_norms:
        norms += normed * (sizes.queries + sizes.keys) + FLOAT32 * (sizes.heads + sizes.kv_heads)
    attention = settings.number * (sizes.queries + 2 * _key_width(sizes, settings))
    if not settings.recompute_attention:
        attention += settings.number * sizes.queries + FLOAT32 * sizes.heads
    inputs = 2 * sizes.hidden + sizes.queries + sizes.intermediate if settings.quantize == "8bit" else 0
    gate = (2 if settings.fused_kernels else 3) * sizes.intermediate
    return norms + attention + settings.number * (gate + inputs)


def adapter_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes that autograd keeps of one token in one layer for the adapters, which compute in float32."""
    if settings.lora is None:
        return 0
    targets, widths = settings.lora.targets, _linear_widths(sizes)
    # Conversion makes a copy for each map; without it, maps of one input share it.
    copies = {_INPUTS[name] if settings.dtype == "float32" else name: widths[name][0] for name in targets}
    return FLOAT32 * (sum(copies.values()) + settings.lora.rank * len(targets))


def adapter_widths(sizes: ModelSizes, settings: StepSettings) -> int:
    """Widths of the inputs of one layer's adapters, summed."""
    widths = _linear_widths(sizes)
    return sum(widths[name][0] for name in settings.lora.targets) if settings.lora else 0


def prefix_bytes(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> int:
    """Bytes of a frozen prefix that attention keeps for the backward pass."""
    if not settings.prefix_is_frozen:
        return 0
    return tokens.query * 2 * sizes.layers * settings.number * _key_width(sizes, settings)


def query_bytes(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> int:
    """Bytes that autograd keeps of the query pass, without a frozen prefix."""
    new = tokens.rows * settings.new_tokens
    each = sizes.layers * (layer_bytes(sizes, settings) + adapter_bytes(sizes, settings)) + once_bytes(sizes, settings)
    seen = (new + tokens.query) // tokens.rows
    if settings.prefix_is_frozen:
        mask = 0 if settings.recompute_attention else sizes.layers * settings.number * seen
        return new * (each + mask)
    return (new + tokens.query) * (each + mask_bytes(sizes, seen, settings))


def response_bytes(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> int:
    """Bytes that autograd keeps of the response pass, without the logits; of checkpoints, the layers' inputs only."""
    row = _response_row(tokens, settings)
    if settings.checkpoint_responses:
        return row * (sizes.layers * settings.number * sizes.hidden + once_bytes(sizes, settings))
    mask = mask_bytes(sizes, row // tokens.rows, settings)
    again = math.ceil(settings.recompute_gates * sizes.layers) if settings.fused_kernels else 0
    saved = again * settings.number * (2 * sizes.intermediate - sizes.hidden)
    return row * (sizes.layers * layer_bytes(sizes, settings) - saved + once_bytes(sizes, settings) + mask)


def logit_bytes(sizes: ModelSizes, tokens: PassTokens, settings: StepSettings) -> int:
    """Bytes of the cross-entropy; of the fused one, also the hidden states, those that predict, and their gradient."""
    if not settings.fused_cross_entropy:
        return _response_row(tokens, settings) * PLAIN_LOGIT * sizes.vocabulary
    chunk = settings.chunk or chunk_positions(sizes.vocabulary)
    logits = min(chunk, tokens.response) * FUSED_LOGIT * sizes.vocabulary
    return logits + 3 * tokens.response * settings.number * sizes.hidden


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits the fused cross-entropy makes at a time on a GPU, if nothing else is set."""
    rows = CHUNK_BYTES // (FLOAT32 * vocabulary)
    return max(128, rows - rows % 128)


def _response_row(tokens: PassTokens, settings: StepSettings) -> int:
    return tokens.rows * settings.compression_tokens + tokens.response


def _key_width(sizes: ModelSizes, settings: StepSettings) -> int:
    return sizes.keys if settings.packed else sizes.queries


def once_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Of one token, kept once and not by each layer: the final norm, the rotations."""
    return FLOAT32 * (sizes.hidden + 1) + 2 * settings.number * sizes.head_dim


def mask_bytes(sizes: ModelSizes, seen: int, settings: StepSettings) -> int:
    """Of one token: attention turns a padding mask into numbers, and each layer keeps its own."""
    return 0 if settings.packed else sizes.layers * settings.number * seen


def _live_bytes(sizes: ModelSizes, tokens: int, settings: StepSettings) -> int:
    """Of these tokens inside one feed-forward network, and the weights that are unpacked for it."""
    unpacked = settings.number * sizes.hidden * sizes.intermediate if settings.quantize else 0
    return unpacked + tokens * settings.number * 3 * (sizes.hidden + sizes.intermediate)


def _linear_widths(sizes: ModelSizes) -> dict[str, tuple[int, int]]:
    """Widths of input and output of a layer's linear maps."""
    d, m, q, k = sizes.hidden, sizes.intermediate, sizes.queries, sizes.keys
    return dict(zip(ALL_LINEAR, ((d, q), (d, k), (d, k), (q, d), (d, m), (d, m), (m, d)), strict=True))


def lora_sizes(lora: LoraParams) -> LoraSizes:
    """The adapters of the params, as far as memory is concerned."""
    return LoraSizes(lora.rank, _adapted(lora.targets))


def _adapted(targets: Sequence[str]) -> tuple[str, ...]:
    if targets == "all-linear":
        return ALL_LINEAR
    ends = {target.rpartition(".")[2] for target in targets}
    return tuple(name for name in ALL_LINEAR if name in ends)
