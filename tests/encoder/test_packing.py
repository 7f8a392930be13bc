"""The packed passes compute what the plain ones do: values and gradients, on real architectures."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.encoder.linear_cross_entropy import linear_cross_entropy
from pipeline.encoder.packing import PackedPasses, fast_passes, shared_prefix
from pipeline.encoder.passes import Passes, PlainPasses
from pipeline.encoder.student import new_student
from tests.conftest import tiny_model

ARCHITECTURES = ["llama", "qwen3", "gemma3"]
QUERIES = [[5, 6, 7], list(range(10, 50)), [9]]
RESPONSES = [[4, 5, 6, 2], [7, 2], list(range(60, 100))]


def losses(passes: Passes, architecture: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = tiny_model(architecture).double()
    student = new_student(model, 5, compression_tokens=3, thought_tokens=2, seed=0).double()
    passes = type(passes)(model)
    hidden = passes.query_pass(QUERIES, student.tokens, 3).double()
    soft = student.reconstruction(hidden)
    loss, count = passes.response_pass(soft, RESPONSES)
    assert count == 46
    (loss / count + student.alignment(soft).mean(1).square().sum()).backward()
    return loss.detach(), {name: value.grad for name, value in student.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_loss_and_gradients(architecture: str) -> None:
    plain, plain_gradients = losses(PlainPasses(tiny_model(architecture)), architecture)
    packed, packed_gradients = losses(PackedPasses(tiny_model(architecture)), architecture)
    torch.testing.assert_close(packed, plain, rtol=1e-6, atol=0)
    assert set(packed_gradients) == set(plain_gradients)
    for name, value in plain_gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * float(value.abs().max())
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_beginning_runs_once_and_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    begin = list(range(30, 55))
    queries = [[*begin, 5], [*begin, 5, 6], [*begin, *range(60, 90)], begin]
    assert shared_prefix(queries) == len(begin) - 1
    tokens = torch.randn(3, 32)
    packed = PackedPasses(model).query_pass(queries, tokens, 2)
    torch.testing.assert_close(packed, PlainPasses(model).query_pass(queries, tokens, 2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "common"), [([[1, 2, 3]], 0), ([[1, 2], [1, 2]], 1), ([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1], [2]], 0)]
)
def test_shared_prefix_leaves_a_token(rows: list[list[int]], common: int) -> None:
    assert shared_prefix(rows) == common


def test_an_architecture_that_cannot_be_packed_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A head that scales its logits is not a plain projection."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 3)
    assert isinstance(fast_passes(model), PlainPasses)
    assert "using the padded passes" in caplog.text


def test_the_backbone_generates_as_before() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)
    PackedPasses(model).query_pass(QUERIES, torch.zeros(2, 32), 2)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2), before)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_linear_cross_entropy_is_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4)
    labels = torch.randint(0, 11, (7,))
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(3 * expected, hidden)
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)
