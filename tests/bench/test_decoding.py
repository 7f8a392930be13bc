"""The loss of the decoding study against sums made by hand and against a model's own distributions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.decoding import computed
from bench.distillation import NEXT, TOP, Answer, DistillationPass, answer_logs, divergences, next_tokens
from pipeline.encoder.passes.plain import PlainResponsePass
from tests.conftest import tiny_model

PROMPTS = [[5, 6, 7, 8], [90, 91, 92, 93]]  # of one length: soft prompts are not padded
ANSWERS = [[10, 11, 12], [13]]


def test_the_rest_of_a_distribution_counts_as_one_token() -> None:
    wanted = np.zeros(1, NEXT)
    wanted["ids"], wanted["logs"] = np.arange(TOP), np.log(1 / 96)
    # 64 kept tokens have 2/3 of the mass; of a uniform distribution over 128 tokens they have a half.
    logs = torch.full((1, 128), -float(np.log(128)))
    expected = 2 / 3 * np.log(128 / 96) + 1 / 3 * np.log(2 / 3)
    assert divergences(logs, wanted).tolist() == pytest.approx([expected], abs=1e-6)


def test_the_query_itself_as_soft_prompt_has_no_divergence() -> None:
    backbone = tiny_model()
    words = backbone.get_input_embeddings()(torch.tensor(PROMPTS)).requires_grad_()
    answers = list(map(Answer, ANSWERS, PROMPTS))
    total, tokens = DistillationPass(backbone)(words, answers)
    assert tokens == 4 and abs(total.item()) < 1e-4
    swapped, _ = DistillationPass(backbone)(words.flip(0), answers)
    assert swapped.item() > 1e-3
    assert torch.autograd.grad(swapped, words)[0].abs().amax((1, 2)).min() > 0
    assert [len(answer.following) for answer in answers if answer.following is not None] == [3, 1]


def test_own_tokens_have_the_cross_entropy_of_the_plain_pass() -> None:
    backbone = tiny_model()
    following = next_tokens(backbone, PROMPTS, ANSWERS)
    words = backbone.get_input_embeddings()(torch.tensor(PROMPTS))
    loss, _ = PlainResponsePass(backbone)(words, ANSWERS)
    assert -following["own"].sum() == pytest.approx(float(loss), rel=1e-5)
    logs = answer_logs(backbone, words, ANSWERS)
    assert logs[torch.arange(4), [10, 11, 12, 13]].tolist() == pytest.approx(following["own"].tolist(), rel=1e-4)
    assert (np.diff(following["logs"]) <= 0).all()  # the likeliest first


def test_what_was_computed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert computed(file, lambda: {"step": 1}) == {"step": 1}
    assert computed(file, lambda: {"step": 2}) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
