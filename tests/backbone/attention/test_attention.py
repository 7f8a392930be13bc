"""Attention of packed rows: each implementation against one dense, masked softmax over the whole row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backbone.attention import varlen as varlen_attention
from pipeline.backbone.attention.flex import flex_packed_attention
from pipeline.backbone.attention.per_segment import segment_attention
from pipeline.backbone.attention.registry import choose_attention, use_attention
from pipeline.backbone.attention.segments import SHARED, Segments, index_tensors
from pipeline.core.errors import BackboneError
from tests.conftest import tiny_model

LAYOUTS = {
    "no cache": Segments.of([5, 1, 9]),
    "own prefixes": Segments.of([3, 3, 3], [7, 1, 4]),
    "a shared prefix": Segments.of([2, 2], [5, 1], shared=6),
    "one sequence": Segments.of([4], [2], shared=0),
}
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"sliding_window": 4},
    "scaled": {"scaling": 0.7},
    "capped": {"softcap": 0.5, "scaling": 1.3, "sliding_window": 6},
}
IN_EACH_LAYOUT = pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS)
BY_EACH_RULE = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def states(segments: Segments, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of 4 heads, and keys and values of 2."""
    generator = torch.Generator().manual_seed(0)
    new, keys = sum(segments.new), segments.cached + sum(segments.new)
    shapes = (1, 4, new, 8), (1, 2, keys, 8), (1, 2, keys, 8)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, `[1, sum(new), heads, head_dim]`."""
    owner, at = segments.queries(query.device)
    key_owner, key_at = segments.keys(query.device)
    seen = (key_owner == owner[:, None]) | (key_owner == SHARED)
    seen &= key_at <= at[:, None]
    if sliding_window is not None:
        seen &= at[:, None] - key_at < sliding_window
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (8**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@IN_EACH_LAYOUT
@BY_EACH_RULE
def test_segment_attention_and_its_gradients(segments: Segments, rules: dict[str, Any]) -> None:
    inputs = states(segments)
    expected = dense(*inputs, segments, **rules)
    found, _ = segment_attention(None, *inputs, None, packed=segments, **rules)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for gradient, right in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-12)


def test_segment_attention_in_half_precision_rounds_only_its_result() -> None:
    segments = LAYOUTS["a shared prefix"]
    inputs = states(segments, torch.bfloat16)
    found, _ = segment_attention(None, *inputs, None, packed=segments)
    expected = dense(*(tensor.double() for tensor in inputs), segments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@IN_EACH_LAYOUT
@BY_EACH_RULE
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(segments: Segments, rules: dict[str, Any]) -> None:
    """Forward only: torch has no backward pass of it on a CPU."""
    inputs = [tensor.detach() for tensor in states(segments)]
    found, _ = flex_packed_attention(None, *inputs, None, packed=segments, **rules)
    torch.testing.assert_close(found, dense(*inputs, segments, **rules), rtol=1e-6, atol=1e-7)


def flash_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What the kernel's documentation says: sequences by cumulative lengths, windows aligned at the sequences' ends."""
    assert enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    left, right = window_size
    outputs = []
    for number in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[number] : cu_seq_q[number + 1]].transpose(0, 1)
        k, v = (
            states[cu_seq_k[number] : cu_seq_k[number + 1]].transpose(0, 1).repeat_interleave(2, dim=0)
            for states in (key, value)
        )
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        seen = torch.arange(k.shape[1])[None]
        mask = seen <= at + right
        if left >= 0:
            mask &= seen >= at - left
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@IN_EACH_LAYOUT
@pytest.mark.parametrize("rule", ["causal", "window", "scaled"])
def test_varlen_attention_on_a_kernel_that_keeps_its_word(
    segments: Segments, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_kernel)
    inputs = states(segments)
    found, _ = varlen_attention.varlen_attention(None, *inputs, None, packed=segments, **RULES[rule])
    expected = dense(*inputs, segments, **RULES[rule])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for gradient, right in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-12)


def test_index_tensors_read_shared_keys_once_a_sequence() -> None:
    index = index_tensors(Segments.of([2, 1], [3, 0], shared=2), torch.device("cpu"))
    assert index.keys is not None
    assert index.keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 7]
    assert (index.query_ends.tolist(), index.key_ends.tolist()) == ([0, 2, 3], [0, 7, 10])
    assert index.positions.tolist() == [[5, 6, 2]]


def test_a_row_without_a_cache_is_read_as_it_lies() -> None:
    assert index_tensors(Segments.of([2, 1]), torch.device("cpu")).keys is None


def test_without_a_gpu_the_choice_is_segments() -> None:
    assert choose_attention(tiny_model(), "auto")[0] == "segments"
    assert choose_attention(tiny_model(), "segments") == ("segments", "as set")


@pytest.mark.parametrize("attention", ["varlen", "flex"])
def test_what_needs_a_gpu_says_so(attention: Any) -> None:
    with pytest.raises(BackboneError, match=f"{attention} cannot run here: .*CUDA device"):
        choose_attention(tiny_model(), attention)


def test_an_unknown_attention_names_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="'paged' is unknown .*segments, varlen, flex"):
        choose_attention(tiny_model(), "paged")  # type: ignore[arg-type]


def test_the_attention_of_the_backbone_comes_back_also_after_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), use_attention(model, "segments"):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
