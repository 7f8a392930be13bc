"""The fused loss against torch's cross-entropy of the full logits: value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.output_head import LogitTransform, chunk_rows, linear_cross_entropy

SHAPES = [
    LogitTransform(),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=1.5),
    LogitTransform(scale=3.0, softcap=0.7),
]


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shape: LogitTransform) -> Tensor:
    logits = F.linear(hidden, weight, bias) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradient_in_float64(chunk: int | None, shape: LogitTransform, with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 4).double().requires_grad_(), torch.randn(11, 4).double()
    labels, bias = torch.randint(0, 11, (7,)), torch.randn(11).double() if with_bias else None
    expected = reference(hidden, weight, labels, bias, shape)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, transform=shape, chunk=chunk)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    (right,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_vocabulary_in_pieces(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.backbone.output_head._CPU_BLOCK", 3)
    test_loss_and_gradient_in_float64(4, SHAPES[3], with_bias)


def test_half_precision_sums_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16()
    labels = torch.randint(0, 50, (300,))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=64)
    expected = reference(hidden.float(), weight.float(), labels, None, LogitTransform())
    (gradient,) = torch.autograd.grad(loss, hidden)
    (right,) = torch.autograd.grad(expected, hidden)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert float((gradient - right).norm() / right.norm()) < 0.02


def test_extreme_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert float(loss) == 2000.0


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    labels = torch.randint(0, 9, (5,))
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(quiet, linear_cross_entropy(hidden.requires_grad_(), weight, labels).detach())


def test_larger_vocabularies_take_fewer_rows_at_a_time() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(49_152, cpu) == 64
    assert chunk_rows(262_144, cpu) == 16
    assert chunk_rows(151_936, torch.device("cuda")) == 384  # 441 rows fit, in whole tiles of 128
