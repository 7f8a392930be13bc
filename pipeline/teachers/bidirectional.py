"""Bidirectional attention in a transformer that was made causal, and a probe that tells whether it is.

Switching only the layers is silently causal on padded batches: the mask is made from the config.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.backbone import pad_left
from pipeline.errors import TeacherError
from pipeline.teachers.pooling import hidden_states

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LONG, SHORT = 12, 7
# Relative to a hidden state's length. A causal model changes by exactly 0; one unit in the last place of one number of
# a bfloat16 vector of 4096 is 6e-5.
MIN_CHANGE = 1e-5
# How far padding may move a row; padding that is attended to moves it by tens of per cent.
TOLERANCE = {"torch.float32": 1e-3, "torch.float16": 0.05, "torch.bfloat16": 0.1}


def make_bidirectional(body: "PreTrainedModel") -> None:
    """Let every token attend to every other, with sdpa and eager attention; without a cache."""
    body.config.is_causal = False
    body.config.use_cache = False
    for module in body.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def check_bidirectional(body: "PreTrainedModel", name: str) -> None:
    """Probe the model with a few tokens of its vocabulary, alone and in a left-padded batch.

    Raises:
        TeacherError: its first token does not see its last, or padding changes a row.
    """
    first, second = _probe_rows(int(body.config.vocab_size))
    alone = _hidden(body, [first[:SHORT]])[0]
    padded = _hidden(body, [second, first[:SHORT]])[1, LONG - SHORT :]
    changed = [*first[: SHORT - 1], second[SHORT - 1]]
    for how, before, after in (
        ("a text alone", alone, _hidden(body, [changed])[0]),
        ("a left-padded batch", padded, _hidden(body, [second, changed])[1, LONG - SHORT :]),
    ):
        if _distance(before[0], after[0]) < MIN_CHANGE:
            raise TeacherError(
                f"teacher {name} is causal in {how}: changing the last token leaves the first as it was. This "
                "architecture, or this version of transformers, ignores is_causal: use another base model"
            )
    moved, limit = _distance(alone.mean(0), padded.mean(0)), TOLERANCE[str(body.dtype)]
    if not moved <= limit:
        raise TeacherError(f"teacher {name}: left padding moves an embedding by {moved:.2g}, the limit is {limit:g}")


def _probe_rows(vocabulary: int) -> tuple[list[int], list[int]]:
    """Two rows of ids spread over the vocabulary that differ at each position."""
    spread = [(1 + index * 7919) % vocabulary for index in range(2 * LONG)]
    return spread[:LONG], spread[LONG:]


def _hidden(body: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        ids, mask = (tensor.to(body.device) for tensor in pad_left(rows))
        return hidden_states(body, ids, mask).float()


def _distance(before: Any, after: Any) -> float:
    return float((before - after).norm() / before.norm())
