"""Scores of the student on held-out rows during training, and the choice of the best one."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.backbone.device import exact_dtype
from pipeline.core.vectors import rank_own
from pipeline.optim.batching import OwnPasses
from pipeline.train.params import Score

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldoutScores:
    """Scores of the held-out rows: `cosine`, `top1` and `mrr` as in `Ranked`.

    `recon` is the cross-entropy of a response token given the soft prompts, in nats.
    """

    cosine: float
    top1: float
    mrr: float
    recon: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, top-1 {self.top1:.3f}, MRR {self.mrr:.3f}, reconstruction {self.recon:.4f}"

    def better(self, other: "HeldoutScores", score: Score) -> bool:
        """Whether `score` is better here than in `other`: lower for recon, higher for the others."""
        mine, theirs = getattr(self, score), getattr(other, score)
        return mine < theirs if score == "recon" else mine > theirs


@dataclass(frozen=True)
class Best:
    """The trained tensors that scored best, after which step, and their scores."""

    step: int
    scores: HeldoutScores
    tensors: Mapping[str, Any]


@dataclass
class Validation:
    """Held-out rows, their scores so far, and the best student if `select` is set.

    Attributes:
        rows: `TrainingRows` that training never sees.
        select: the score that the best student is chosen by; None: the last student stays.
        curve: step and scores of each scoring.
    """

    rows: Any
    select: Score | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    best: Best | None = None

    def add(self, step: int, scores: HeldoutScores, trained: Mapping[str, Any]) -> None:
        """Add the scores of the student after `step` steps; `trained` is kept if they are the best so far."""
        self.curve.append({"step": step, **asdict(scores)})
        log.info("held out after %d steps: %s", step, scores)
        if self.select and (self.best is None or scores.better(self.best.scores, self.select)):
            self.best = Best(step, scores, {name: value.detach().clone() for name, value in trained.items()})

    def restore_best(self, trained: Mapping[str, Any]) -> None:
        """Give the trained tensors the values that scored best, if `select` is set."""
        if self.best is not None:
            for name, parameter in trained.items():
                parameter.data.copy_(self.best.tensors[name])
            log.info("restored the student of step %d: best held-out %s", self.best.step, self.select)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint without the best tensors; serialises to JSON."""
        best = None if self.best is None else {"step": self.best.step, "scores": asdict(self.best.scores)}
        return {"curve": self.curve, "best": best}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """The inverse of `state`, with the best tensors."""
        self.curve = list(state["curve"])
        if state["best"] is not None:
            self.best = Best(state["best"]["step"], HeldoutScores(**state["best"]["scores"]), tensors)


def heldout_scores(rows: Any, own: OwnPasses, student: Any, passes: Any, accelerator: Any) -> HeldoutScores:
    """Scores of `TrainingRows`, of which each process runs its `own` passes through the backbone."""
    import torch

    embeddings = torch.zeros(len(rows), rows.width, device=student.tokens.device)
    device = student.tokens.device
    totals = torch.zeros(2, dtype=exact_dtype(device), device=device)
    with torch.no_grad():
        for indices, weight in own:
            batch = rows.batch(indices)
            states = passes.query_pass(batch.query_ids, student.tokens, student.compression_tokens, batch.pooled)
            soft_prompts, found = student(states)
            summed, count = passes.response_pass(soft_prompts, batch.response_ids)
            if weight:
                embeddings[indices] = found.float()
                totals[0] += summed
                totals[1] += count
    embeddings, totals = (accelerator.reduce(tensor, "sum") for tensor in (embeddings, totals))
    ranked, (loss, tokens) = rank_own(embeddings.cpu().numpy(), rows.targets), totals.tolist()
    return HeldoutScores(ranked.cosine, ranked.top1, ranked.mrr, loss / max(1, tokens))
