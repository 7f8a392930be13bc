"""Gradient steps of the study: AdamW on the projections alone, on projections and tokens, or on both losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.training_study.data import MAX_RESPONSE_TOKENS, HiddenStates, Part

_CE_ROWS = 32
_WARMUP = 5


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of AdamW, reached after five steps; then constant, or falling to 0 at the last step."""

    projections: float
    tokens: float = 0.0
    falling: bool = False

    def factor(self, step: int, total: int) -> float:
        """Of the peaks at a step, counted from 1."""
        return min(1.0, step / _WARMUP) * (1.0 - (step - 1) / total if self.falling else 1.0)


def descend(
    student: Any,
    loss: Callable[[list[int]], Any],
    rates: Rates,
    *,
    rows: int,
    batch_size: int,
    checkpoints: Sequence[int],
    look: Callable[[int], None],
    seed: int = 0,
) -> None:
    """Train in place up to the last checkpoint; `look` is called before the first step and at each checkpoint.

    Args:
        student: what is trained.
        loss: of a batch of row numbers.
        rates: learning rates; a rate of 0 leaves the tokens as they are.
        rows: how many there are to draw from, epoch by epoch.
        batch_size: rows of a step.
        checkpoints: steps, ascending.
        look: gets the number of steps taken.
        seed: of the order of rows.
    """
    import torch

    from pipeline.core.run import progress

    projections = [*student.reconstruction.parameters(), *student.alignment.parameters()]
    student.tokens.requires_grad_(rates.tokens > 0)
    groups = [{"params": projections, "peak": rates.projections}, {"params": [student.tokens], "peak": rates.tokens}]
    optimizer = torch.optim.AdamW([group for group in groups if group["peak"]], lr=0.0, weight_decay=0.0)
    generator, order = np.random.default_rng(seed), np.empty(0, dtype=int)
    look(0)
    for step in progress(range(1, checkpoints[-1] + 1), total=checkpoints[-1], desc="steps", unit="step"):
        if len(order) < batch_size:
            order = generator.permutation(rows)
        batch, order = order[:batch_size].tolist(), order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rates.factor(step, checkpoints[-1])
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_([value for value in student.parameters() if value.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in checkpoints:
            look(step)


def projection_loss(student: Any, hidden: np.ndarray, targets: np.ndarray) -> Callable[[list[int]], Any]:
    """Alignment alone with fixed tokens: the hidden states `[N, n, d]` never change, and only their mean matters.

    The embedding is the mean over tokens of an affine map, so it is the map of the mean.
    """
    import torch

    features, wanted = torch.from_numpy(np.ascontiguousarray(hidden.mean(1))), torch.from_numpy(targets)

    def loss(batch: list[int]) -> Any:
        embeddings = student.alignment(student.reconstruction(features[batch]))
        return (embeddings - wanted[batch]).square().sum(-1).mean()

    return loss


def alignment_loss(student: Any, passes: Any, prompts: Any, targets: np.ndarray) -> Callable[[list[int]], Any]:
    """Alignment alone, through the backbone: tokens train as well."""
    import torch

    def loss(batch: list[int]) -> Any:
        hidden = passes.query_pass([prompts[row] for row in batch], student.tokens, student.compression_tokens)
        embeddings = student.embedding(student.soft_prompts(hidden))
        return (embeddings - torch.from_numpy(targets[batch])).square().sum(-1).mean()

    return loss


def joint_loss(
    student: Any, passes: Any, prompts: Any, responses: Any, targets: np.ndarray, align_weight: float
) -> Callable[[list[int]], Any]:
    """`align_weight * summed squared error + cross-entropy per response token`."""
    import torch

    def loss(batch: list[int]) -> Any:
        hidden = passes.query_pass([prompts[row] for row in batch], student.tokens, student.compression_tokens)
        soft = student.soft_prompts(hidden)
        align = (student.embedding(soft) - torch.from_numpy(targets[batch])).square().sum(-1).mean()
        recon, tokens = passes.response_pass(soft, [responses[row] for row in batch])
        return align_weight * align + recon / tokens

    return loss


def response_ids(states: HiddenStates, part: Part) -> list[list[int]]:
    """Token ids of the answers, with EOS where the backbone ended them itself."""
    ids = states.tokenizer(part.responses, add_special_tokens=False)["input_ids"]
    end = states.tokenizer.eos_token_id
    return [
        [*row, end][:MAX_RESPONSE_TOKENS] if finished else row[:MAX_RESPONSE_TOKENS]
        for row, finished in zip(ids, part.finished, strict=True)
    ]


def cross_entropies(student: Any, passes: Any, hidden: np.ndarray, responses: Any) -> tuple[float, float]:
    """Nats per response token over the first held-out rows, from the row's own soft prompts and from another row's."""
    import torch

    with torch.inference_mode():
        soft = student.soft_prompts(torch.from_numpy(np.array(hidden[:_CE_ROWS])))
        sums = [passes.response_pass(prompts, responses[:_CE_ROWS]) for prompts in (soft, soft.roll(1, dims=0))]
    own, other = (float(total) / tokens for total, tokens in sums)
    return own, other
