"""The backbone's own next-token distributions given the query, and the loss that takes soft prompts towards them.

Of each distribution its `TOP` likeliest tokens are kept, the rest is one token more. The divergence of these is the
most that is known of the divergence of the whole: never more than that, and 0 where the distributions are equal.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TOP = 64
"""Tokens kept of a distribution: 512 bytes a response token."""
_ROWS = 16
NEXT = np.dtype([("ids", np.int32, (TOP,)), ("logs", np.float32, (TOP,)), ("own", np.float32)])
"""Of a response token: the likeliest tokens there, their log probabilities, and the log probability of its own."""


class Answer(list[int]):
    """Token ids of a response that know their prompt, and the backbone's distribution at each once it was asked.

    Attributes:
        prompt: token ids.
        following: `NEXT`, `[length]`.
    """

    def __init__(self, ids: Iterable[int], prompt: Sequence[int]) -> None:
        super().__init__(ids)
        self.prompt = prompt
        self.following: np.ndarray | None = None


def following(backbone: Any, answers: Sequence[Answer]) -> np.ndarray:
    """`NEXT` of every token of answers, `[sum of lengths]`; the backbone reads those that it did not read before."""
    new = [answer for answer in answers if answer.following is None]
    if new:
        found = next_tokens(backbone, [answer.prompt for answer in new], new)
        for answer, part in zip(new, np.split(found, np.cumsum([len(each) for each in new])[:-1]), strict=True):
            answer.following = part
    return np.concatenate([answer.following for answer in answers if answer.following is not None])


def next_tokens(backbone: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """`NEXT` of every token of answers behind their prompts, `[sum of lengths]` in the order of the rows."""
    import torch

    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for start in range(0, len(order), _ROWS):
            at = order[start : start + _ROWS]
            parts = _together(backbone, [prompts[row] for row in at], [answers[row] for row in at])
            found |= zip(at, parts, strict=True)
    return np.concatenate([found[row] for row in range(len(prompts))])


def _together(backbone: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    import torch

    from pipeline.backbone.prompting import pad_right

    ids, mask = pad_right([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    states = backbone.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    ends = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    before = torch.cat([row[start - 1 : end - 1] for row, (start, end) in zip(states, ends, strict=True)])
    logs = log_probabilities(backbone, before)
    top = logs.topk(TOP)
    result = np.empty(len(logs), NEXT)
    result["ids"], result["logs"] = top.indices.numpy(), top.values.numpy()
    result["own"] = logs.gather(1, torch.tensor([[token] for answer in answers for token in answer]))[:, 0].numpy()
    return np.split(result, np.cumsum([len(answer) for answer in answers])[:-1])


def log_probabilities(backbone: Any, hidden: "Tensor") -> "Tensor":
    """Of every token `[M, V]`, float32, at final-normed hidden states `[M, d]`; for heads without cap or scale."""
    return backbone.get_output_embeddings()(hidden).float().log_softmax(-1)


def answer_logs(backbone: Any, soft_prompts: "Tensor", answers: Sequence[Sequence[int]]) -> "Tensor":
    """Log probabilities `[sum of lengths, V]` at every token of answers behind soft prompts `[B, n, d]` alone."""
    from contextlib import nullcontext

    import torch

    from pipeline.encoder.passes.padded import padded_response_pass

    found: list[Tensor] = []

    def keep(batch: Any) -> "Tensor":
        hidden = backbone.get_decoder()(**batch.arguments, use_cache=False).last_hidden_state
        found.append(log_probabilities(backbone, hidden.flatten(0, 1)[batch.predicting]))
        return torch.zeros(())

    padded_response_pass(backbone, keep, nullcontext)(soft_prompts, answers)
    return found[0]


def divergences(logs: "Tensor", wanted: np.ndarray) -> "Tensor":
    """Kullback-Leibler divergence in nats, `[M]`, from distributions `NEXT` `[M]` to log probabilities `[M, V]`."""
    import torch

    kept = torch.from_numpy(wanted["logs"])
    has = logs.gather(1, torch.from_numpy(wanted["ids"].astype(np.int64)))
    kept, has = (torch.cat([each, _rest(each)], dim=1) for each in (kept, has))
    return (kept.exp() * (kept - has)).sum(1)


def _rest(logs: "Tensor") -> "Tensor":
    """Logarithm of what is left of 1, `[M, 1]`, at least one in a million."""
    return (1.0 - logs.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()


class DistillationPass:
    """A `ResponsePass` over `Answer`s whose loss is the divergence from the backbone's own distributions."""

    padded = True

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone

    def __call__(self, soft_prompts: "Tensor", response_ids: Sequence[Sequence[int]]) -> "tuple[Tensor, int]":
        """The sum over all response tokens, and their number."""
        wanted = following(self._backbone, [answer for answer in response_ids if isinstance(answer, Answer)])
        logs = answer_logs(self._backbone, soft_prompts, response_ids)
        return divergences(logs, wanted).sum(), len(logs)
