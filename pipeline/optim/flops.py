"""Floating-point operations that training and reading ask for, whatever way they are computed.

A multiplication and its addition count as two. The frozen weights need no gradient, so backward costs once what forward
costs in linear maps, not twice; the prefix of a query runs forward only. Attention is counted as full rectangles, as is
usual, though half of each is masked. Padding, recomputation, softmax, norms and rotations are not counted.
"""

from collections.abc import Iterable

from pipeline.backbone.sizes import ModelSizes


def read_flops(sizes: ModelSizes, tokens: float, mean_length: float) -> float:
    """Operations of forward passes over so many tokens without the output head, in texts of this mean length."""
    return tokens * sizes.layers * (2 * sizes.layer_parameters() + 4 * sizes.queries * mean_length)


def step_flops(
    sizes: ModelSizes,
    lengths: Iterable[tuple[int, int]],
    *,
    compression_tokens: int,
    thought_tokens: int = 0,
    width: int | None = None,
    adapter_parameters: int = 0,
) -> int:
    """Operations of forward and backward for rows of these query and response tokens.

    `width` None is the backbone's hidden size. With `adapter_parameters`, of LoRA on the query pass, the prefix needs
    gradients too.
    """
    new = compression_tokens + thought_tokens
    linear = 2 * sizes.layers * sizes.layer_parameters()
    attention = 4 * sizes.layers * sizes.queries
    # Of a token: forward, and backward to its inputs.
    once, both = linear, 2 * linear
    query = both + 6 * adapter_parameters if adapter_parameters else once
    projections = 6 * sizes.hidden * (sizes.hidden + (width or sizes.hidden))
    total = 0
    for prefix, response in lengths:
        row = compression_tokens + response
        total += prefix * query + new * (both + 6 * adapter_parameters) + row * both
        total += attention * (3 * row * row + _query_rectangles(prefix, new, frozen=not adapter_parameters))
        total += response * 4 * sizes.hidden * sizes.vocabulary + compression_tokens * projections
    return total


def _query_rectangles(prefix: int, new: int, *, frozen: bool) -> int:
    """Pairs of tokens that attention looks at in a query pass, those with gradients three times."""
    if frozen:
        return prefix * prefix + 3 * new * (prefix + new)
    return 3 * (prefix + new) ** 2
