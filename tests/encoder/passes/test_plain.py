"""The plain passes against what the definitions say, on real architectures with random weights."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.encoder.passes.plain import Pooled, plain_passes
from tests.conftest import tiny_model

ARCHITECTURES = ["llama", "qwen3", "gemma3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_query_pass_ignores_padding(architecture: str) -> None:
    passes = plain_passes(tiny_model(architecture))
    tokens = torch.randn(4, 32)
    short, long = [5, 6, 7], list(range(10, 40))
    together = passes.query_pass([short, long], tokens, read=3)
    alone = torch.cat([passes.query_pass([short], tokens, read=3), passes.query_pass([long], tokens, read=3)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert together.shape == (2, 3, 32)


@pytest.mark.parametrize("with_tokens", [False, True])
def test_the_mean_over_a_span_stands_in_front(with_tokens: bool) -> None:
    model = tiny_model("llama")
    rows = model.get_input_embeddings()(torch.tensor([8, 9]))
    queries, spans = [[5, 6, 7], [4, 3, 2, 1]], [slice(1, 3), slice(0, 1)]
    found = plain_passes(model).query_pass(queries, rows, 1, Pooled(spans, with_tokens))
    for row, (ids, span) in enumerate(zip(queries, spans, strict=True)):
        [states] = model.get_decoder()(input_ids=torch.tensor([[*ids, 8, 9]])).last_hidden_state
        pooled = torch.cat([states[span], states[-1:]]) if with_tokens else states[span]
        torch.testing.assert_close(found[row], torch.stack([pooled.mean(0), states[-1]]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_query_pass_equals_vocabulary_tokens(architecture: str) -> None:
    """New tokens that copy vocabulary rows give the hidden states of those words."""
    model = tiny_model(architecture)
    rows = model.get_input_embeddings()(torch.tensor([8, 9]))
    hidden = plain_passes(model).query_pass([[5, 6]], rows, read=2)
    expected = model.get_decoder()(input_ids=torch.tensor([[5, 6, 8, 9]])).last_hidden_state[:, 2:]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_pass_is_cross_entropy_row_by_row(architecture: str) -> None:
    model = tiny_model(architecture)
    soft = torch.randn(2, 3, 32)
    responses = [[4, 5, 6, 2], [7, 2]]
    total, count = plain_passes(model).response_pass(soft, responses)
    expected = torch.tensor(0.0)
    for prompts, ids in zip(soft, responses, strict=True):
        embeds = torch.cat([prompts[None], model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
        logits = model(inputs_embeds=embeds).logits[0]
        for offset, token in enumerate(ids):
            expected = expected - F.log_softmax(logits[2 + offset], dim=-1)[token]
    assert count == 6
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


def test_gradients_reach_tokens_and_soft_prompts_only() -> None:
    model = tiny_model()
    passes = plain_passes(model)
    tokens = torch.randn(3, 32, requires_grad=True)
    hidden = passes.query_pass([[5, 6]], tokens, read=2)
    loss, _ = passes.response_pass(hidden, [[4, 2]])
    loss.backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
