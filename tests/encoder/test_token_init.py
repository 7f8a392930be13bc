"""Starts of the new tokens against the distributions that define them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.config import validate
from pipeline.core.errors import ParamsError, TrainingError
from pipeline.encoder.passes.plain import plain_passes
from pipeline.encoder.student import new_student
from pipeline.encoder.token_init import NormalRows, TokenInitKind, TokenInitParams, WordRows, token_init
from pipeline.train.losses import Batch, loss_sums
from tests.conftest import tiny_model, tiny_tokenizer


def vocabulary(rows: int = 300, width: int = 6) -> nn.Embedding:
    """Embeddings whose columns are correlated and lie off the origin, in more than one chunk if asked for."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(width, width, generator=generator)
    return nn.Embedding.from_pretrained(torch.randn(rows, width, generator=generator) @ mixing + 2.0)


def covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def test_random_has_mean_and_covariance_of_the_vocabulary() -> None:
    embeddings = vocabulary()
    drawn = NormalRows()(embeddings, 40_000, seed=0)
    spread = covariance(embeddings.weight).diagonal().sqrt()
    assert ((drawn.mean(0) - embeddings.weight.mean(0)).abs() < 4 * spread / 200).all()
    scale = spread[:, None] * spread
    assert ((covariance(drawn) - covariance(embeddings.weight)).abs() / scale).max() < 0.03


def test_random_stays_in_the_span_of_the_vocabulary() -> None:
    """A direction in which no row differs gets no noise, also where the covariance has no Cholesky factor."""
    weight = vocabulary().weight.clone()
    weight[:, 2] = 5.0
    drawn = NormalRows()(nn.Embedding.from_pretrained(weight), 50, seed=1)
    torch.testing.assert_close(drawn[:, 2], torch.full((50,), 5.0), atol=1e-5, rtol=0)
    assert (drawn[:, 0] - drawn[0, 0]).abs().max() > 0.1


def test_a_large_vocabulary_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NormalRows()(vocabulary(), 5, seed=3)
    monkeypatch.setattr("pipeline.encoder.token_init._CHUNK", 64)
    torch.testing.assert_close(NormalRows()(vocabulary(), 5, seed=3), whole, atol=1e-5, rtol=1e-5)


def test_mean_is_where_transformers_starts_added_tokens() -> None:
    """transformers writes of the full covariance and multiplies it by 1e-9."""
    model = tiny_model()
    resized = copy.deepcopy(model)
    with warnings.catch_warnings(record=True):
        resized.resize_token_embeddings(260 + 2000)
    theirs = resized.get_input_embeddings().weight[260:]
    ours = token_init("mean", None, None)(model.get_input_embeddings(), 2000, seed=0)
    mean = model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close((ours - mean).std(), (theirs - mean).std(), rtol=0.05, atol=0)
    assert (ours - mean).abs().max() < 1e-5
    assert len(ours.unique(dim=0)) == 2000


def test_words_in_their_order_again_or_averaged() -> None:
    embeddings = vocabulary()
    rows = embeddings.weight
    words = WordRows((4, 9, 7))
    assert torch.equal(words(embeddings, 3, 0), rows[[4, 9, 7]])
    assert torch.equal(words(embeddings, 7, 0), rows[[4, 9, 7, 4, 9, 7, 4]])
    torch.testing.assert_close(words(embeddings, 2, 0), torch.stack([(rows[4] + rows[9]) / 2, rows[7]]))
    torch.testing.assert_close(words(embeddings, 1, 0)[0], rows[[4, 9, 7]].mean(0))


def test_words_are_those_of_the_tokenizer() -> None:
    tokenizer, embeddings = tiny_tokenizer(), vocabulary()
    start = token_init("words", "hi", tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["h", "i"])
    assert torch.equal(start(embeddings, 2, 0), embeddings.weight[ids])
    with pytest.raises(TrainingError, match="words: '' gives 0 tokens, at least 1 is needed"):
        token_init("words", "", tokenizer)


@pytest.mark.parametrize("content", [{"kind": "words"}, {"kind": "mean", "words": "x"}, {"kind": "zeros"}])
def test_words_belong_to_their_kind(content: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="kind"):
        validate(content, TokenInitParams, where="params.yaml")


@pytest.mark.parametrize("kind", ["vocabulary", "random", "mean", "words"])
def test_gemma_tokens_start_on_the_scale_of_its_inputs(kind: TokenInitKind) -> None:
    """Gemma multiplies embeddings by sqrt(d) on the way in."""
    embeddings = tiny_model("gemma3").get_input_embeddings()
    inputs = embeddings(torch.arange(260))
    rows = token_init(kind, "abcdefghijklmnop", tiny_tokenizer())(embeddings, 16, seed=0)
    assert rows.dtype == torch.float32
    expected = inputs.mean(0).norm() if kind == "mean" else inputs.norm(dim=-1).mean()
    torch.testing.assert_close(rows.norm(dim=-1).mean(), expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("kind", ["vocabulary", "random", "mean", "words"])
@pytest.mark.parametrize(("compression", "thought"), [(1, 0), (1, 20), (100, 0), (100, 20)])
def test_any_number_of_tokens_trains(kind: TokenInitKind, compression: int, thought: int) -> None:
    model = tiny_model("qwen3")
    student = new_student(
        model, 5, compression_tokens=compression, thought_tokens=thought, seed=0,
        start=token_init(kind, "why", tiny_tokenizer()),
    )  # fmt: skip
    assert student.tokens.shape == (compression + thought, 32)
    sums = loss_sums(student, plain_passes(model), Batch([[5, 6], [7]], [[8, 2], [9]], torch.zeros(2, 5)), "mean")
    (sums.align + sums.recon).backward()  # type: ignore[no-untyped-call]
    gradient = student.tokens.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()


def test_starts_follow_the_seed() -> None:
    embeddings = vocabulary()
    for kind in ("vocabulary", "random", "mean"):
        start = token_init(kind, None, None)  # type: ignore[arg-type]
        assert torch.equal(start(embeddings, 4, 1), start(embeddings, 4, 1))
        assert not torch.equal(start(embeddings, 4, 1), start(embeddings, 4, 2))
