"""Which tokens are hidden, which position predicts each, and that predicting is learnt."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbone.output_head import LogitTransform, logit_transform
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.template import Tokens
from pipeline.optim.batching import Batches
from pipeline.teach.dropout import SeededDropout
from pipeline.teach.mntp import MaskedRow, MntpObjective, mask_row, mask_token_id, maskable, predicting_positions
from tests.conftest import tiny_tokenizer
from tests.teach.helpers import adapted, read

MASK = 255


def objective(rows: list[Tokens], *, dropout: float = 0.0, micro: int = 4) -> tuple[MntpObjective, dict[str, Any]]:
    body, trained, lm = adapted(dropout=dropout)
    drops = SeededDropout(body, 0.0)
    made = MntpObjective(
        body, drops, rows, head=lm.get_output_embeddings(), transform=logit_transform(lm), fraction=0.2, mask_id=MASK,
        micro_batch_size=micro, seed=0,
    )  # fmt: skip
    return made, trained


def test_a_fifth_of_the_own_tokens_is_hidden_and_never_the_first() -> None:
    row = Tokens(list(range(100, 121)), [0] + [1] * 19 + [0])  # BOS, nineteen own, EOS
    seen: set[int] = set()
    for step in range(200):
        masked = mask_row(row, 0.2, MASK, (0, step))
        assert len(masked.positions) == 4
        assert masked.labels == [100 + at for at in masked.positions]
        assert [at for at, token in enumerate(masked.ids) if token == MASK] == masked.positions
        seen |= set(masked.positions)
    assert seen == set(range(1, 20))
    assert maskable(Tokens([7, 8], [1, 1])) == [1]
    assert maskable(Tokens([7], [1])) == []
    assert mask_row(row, 0.2, MASK, (0, 5)) == mask_row(row, 0.2, MASK, (0, 5)) != mask_row(row, 0.2, MASK, (0, 6))


def test_a_hidden_token_is_predicted_one_position_before_it_behind_padding_too() -> None:
    rows = [MaskedRow([1, MASK, 3, MASK], [1, 3], [2, 4]), MaskedRow([5, MASK], [1], [6])]
    assert predicting_positions(rows) == [0, 2, 4 + 2]  # the second row lies in columns 2 and 3


class KnowsNext(torch.nn.Module):
    """A body whose hidden state at each position is the one-hot vector of the token that really comes next."""

    device = torch.device("cpu")

    def __init__(self, real: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.real = real

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        states = torch.zeros(*input_ids.shape, 300)
        for index, (ids, attended) in enumerate(zip(input_ids, attention_mask, strict=True)):
            own = ids[attended.bool()].tolist()
            start = len(ids) - len(own)
            for at, following in enumerate(self.real[tuple(own)][1:]):
                states[index, start + at, following] = 50.0
        return type("Output", (), {"last_hidden_state": states})


def test_logits_meet_the_labels_that_come_next() -> None:
    """With a body that knows the next token the loss is zero; it is large for any other position."""
    rows = [Tokens(list(range(20 * n, 20 * n + 4 + n)), [1] * (4 + n)) for n in range(1, 5)]
    masked = [mask_row(row, 0.5, MASK, (0, n)) for n, row in enumerate(rows)]
    body = KnowsNext({tuple(hidden.ids): row.ids for hidden, row in zip(masked, rows, strict=True)})
    head = torch.nn.Linear(300, 300, bias=False).requires_grad_(False)
    head.weight.data = torch.eye(300)
    body_only: Any = body
    drops: Any = None
    made = MntpObjective(
        body_only,
        drops,
        rows,
        head=head,
        transform=LogitTransform(),
        fraction=0.5,
        mask_id=MASK,
        micro_batch_size=4,
        seed=0,
    )
    assert float(made.loss_sum(masked)) == pytest.approx(0.0, abs=1e-5)
    shifted = [MaskedRow(row.ids, row.positions, [label + 1 for label in row.labels]) for row in masked]
    assert float(made.loss_sum(shifted)) > 10


def test_gradients_are_those_of_the_models_own_logits() -> None:
    rows = read(["hello there you", "a longer text than that one", "ab"])
    made, trained = objective(rows, micro=2)
    loss = made.gradients([1, 0, 2], step=3)
    found = {name: value.grad.clone() for name, value in trained.items()}
    made.body.zero_grad()
    _, _, lm = adapted()
    total, count = torch.tensor(0.0), 0
    for row in (0, 1, 2):
        masked = mask_row(rows[row], 0.2, MASK, (0, 3, row))
        hidden = made.body(input_ids=torch.tensor([masked.ids]), use_cache=False).last_hidden_state[0]
        logits = lm.get_output_embeddings()(hidden)
        for at, label in zip(masked.positions, masked.labels, strict=True):
            total = total - logits[at - 1].log_softmax(-1)[label]
            count += 1
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value.grad, atol=1e-5, rtol=1e-3)


def test_the_loss_falls() -> None:
    rows = read([f"abcdefghij{'klm' * n}" for n in range(1, 9)])
    made, trained = objective(rows)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    batches = Batches([len(row.ids) for row in rows], 4, seed=0)
    losses = []
    for step in range(40):
        losses.append(made.gradients(batches.at(step), step))
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_dropout_of_the_adapters_is_drawn_by_step() -> None:
    rows = read(["hello there you", "a longer text"])
    made, trained = objective(rows, dropout=0.5)
    for name, value in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    once, again = made.gradients([0, 1], 0), made.gradients([0, 1], 0)
    assert once == again
    assert made.dropout.active == {"lora": 21}


def test_the_mask_token_is_one_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode([mask_token_id(tokenizer, "_")]) == "_"
    with pytest.raises(TeacherError, match=r"^mask_token: '\[MASK\]' is 6 tokens"):
        mask_token_id(tokenizer, "[MASK]")


def test_an_unknown_mask_token_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert mask_token_id(tokenizer, "a") == 1
    with pytest.raises(TeacherError, match="is an unknown token"):
        mask_token_id(tokenizer, "_")
