"""Two readings under dropout, gradients over a batch that does not fit, and clusters that separate."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import PooledTeacher
from pipeline.embed.teachers.template import TemplateTokenizer
from pipeline.optim.batching import Batches
from pipeline.teach.dropout import SeededDropout
from pipeline.teach.simcse import SimcseObjective, contrastive_loss
from tests.conftest import tiny_tokenizer
from tests.teach.helpers import adapted, read, two_clusters

TEXTS = ["short", "a text that is rather longer than the others", "x y", "another one of middle size"]


def objective(texts: list[str], *, micro: int, rate: float = 0.3, dropout: float = 0.0, **keys: Any) -> Any:
    body, trained, _ = adapted(dropout=dropout, **keys)
    made = SimcseObjective(body, SeededDropout(body, rate), read(texts), scale=20.0, micro_batch_size=micro, seed=0)
    return made, trained


def test_the_loss_is_that_of_the_paper() -> None:
    first, second = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    own, other = np.exp(20.0), np.exp(0.0)
    assert float(contrastive_loss(first, second, 20.0)) == pytest.approx(-np.log(own / (own + 2 * other)), abs=1e-6)
    assert float(contrastive_loss(first, second.roll(1, 0), 2.0)) == pytest.approx(np.log(2 + np.exp(2.0)), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_dropout_differs_between_views_and_is_off_at_inference(architecture: str) -> None:
    made, _ = objective(TEXTS, micro=4, architecture=architecture)
    rows = list(range(4))
    with torch.no_grad():
        first, second = (made._view(rows, 0, view, 0) for view in (0, 1))
        same, later = made._view(rows, 0, 0, 0), made._view(rows, 1, 0, 0)
        plain, again = made.vectors(rows), made.vectors(rows)
    assert made.dropout.active == {"attention": 3}
    assert torch.equal(first, same)
    assert torch.equal(plain, again)
    for one, other in ((first, second), (first, later), (first, plain)):
        assert ((one - other).norm(dim=1) > 1e-3).all()
    assert not any(module.training for module in made.body.modules())


def test_it_pools_as_the_teacher_does() -> None:
    made, _ = objective(TEXTS, micro=4)
    tokenizer = TemplateTokenizer(tiny_tokenizer(), max_tokens=64)
    expected = PooledTeacher(made.body, tokenizer, identity={}).embed(TEXTS)
    np.testing.assert_allclose(made.vectors(range(4)).detach().numpy(), expected, atol=1e-5)


def test_a_batch_in_parts_has_the_gradients_of_the_whole() -> None:
    """The same dropout by parts, once through the cache and once with all graphs kept."""
    made, trained = objective(TEXTS, micro=2, dropout=0.1)
    loss = made.gradients([1, 3, 0, 2], step=5)
    cached = {name: value.grad.clone() for name, value in trained.items()}
    made.body.zero_grad()
    sides = [torch.cat([made._view(part, 5, view, at) for at, part in enumerate(([1, 3], [0, 2]))]) for view in (0, 1)]
    whole = contrastive_loss(sides[0], sides[1], 20.0)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, value in trained.items():
        torch.testing.assert_close(cached[name], value.grad, atol=1e-5, rtol=1e-3)


def test_no_dropout_at_all_is_refused() -> None:
    with pytest.raises(TeacherError, match="^dropout: 0 leaves"):
        objective(TEXTS, micro=4, rate=0.0)


def test_lora_dropout_alone_is_enough_where_the_architecture_has_none() -> None:
    made, trained = objective(TEXTS, micro=4, rate=0.0, dropout=0.3)
    for name, value in trained.items():
        if "lora_B" in name:
            torch.nn.init.constant_(value, 0.1)
    with torch.no_grad():
        first, second = (made._view([0, 1], 0, view, 0) for view in (0, 1))
    assert made.dropout.active == {"lora": 21}
    assert not torch.allclose(first, second, atol=1e-3)


def separation(vectors: Any) -> float:
    """Mean cosine within the two clusters (alternating rows) minus that across."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, other = unit @ unit.T, ~np.eye(len(unit), dtype=bool)
    same = (np.arange(len(unit))[:, None] + np.arange(len(unit))) % 2 == 0
    return float(cosines[same & other].mean() - cosines[~same].mean())


def test_two_clusters_separate() -> None:
    texts = two_clusters(64)
    made, trained = objective(texts, micro=16)
    before = separation(made.vectors(range(64)).detach().numpy())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.001)
    batches = Batches([len(row.ids) for row in made.rows], 16, seed=0)
    losses = []
    for step in range(25):
        losses.append(made.gradients(batches.at(step), step))
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert separation(made.vectors(range(64)).detach().numpy()) > 3 * before > 0
