"""Closed-form start of the projections, so that minutes of training are enough on a small machine.

The embedding is linear in the soft prompts, so the best linear map to the targets needs no gradient: ridge regression.
The soft prompts start as the embeddings of a frame, the tokens with which the backbone's chat template opens an answer,
plus the hidden states at half an input embedding's norm: the backbone then begins an answer at once. The paper starts
both projections at random.

One query pass over the rows suffices, which the processes share: soft prompts are an affine map of hidden states, so
the sums are taken of hidden states and mapped at the end, where one process solves the equations. Five folds of them
choose the strength of the ridge. At d = e = 4096 that is 5 x (134 + 134) MB of sums, about 1 GB more while the
equations are solved, and at most 330 MB of rows. What the pass gives is kept on the disk (`pipeline.train.states`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object

from pipeline.core.errors import TrainingError
from pipeline.core.vectors import rank_own
from pipeline.encoder.student import Student
from pipeline.train.data import TrainingRows
from pipeline.train.ridge import LinearMap, Moments, fit_ridge
from pipeline.train.states import RowPasses, States

log = logging.getLogger(__name__)

STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)
FOLDS = 5
SCORED_ROWS = 1_000
"""Held-out rows per fold that ridge strengths are scored on; each row's target is ranked among this many."""
SPREAD = 0.5
"""Share of the input embeddings' mean norm by which soft prompts vary around the frame."""
LEAST_OFFSET = 0.1
"""Share of the spread: directions in which positions differ by less on average stay, or they would swamp the rest."""
LEAST_SPREAD = 1e-12
"""Share of the mean's squared length below which the squared spread of hidden states is rounding."""
_BLOCK = 1_000  # rows that wait for one matrix product


@dataclass
class _Fold:
    """Sums over every fifth row, the first of these rows with their numbers, and rows that wait for a block."""

    moments: Moments | None = None
    scored: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    waiting: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, numbers: np.ndarray, features: np.ndarray, targets: np.ndarray) -> None:
        scored = numbers < FOLDS * SCORED_ROWS
        if scored.any():
            self.scored.append((numbers[scored], features[scored], targets[scored]))
        self.waiting.append((features, targets))
        if sum(len(rows) for rows, _ in self.waiting) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            block = Moments.of(*map(np.concatenate, zip(*self.waiting, strict=True)))
            self.moments = block if self.moments is None else self.moments + block
            self.waiting = []

    def combine(self, accelerator: Any, width: tuple[int, int]) -> None:
        """Make this the fold of all processes' rows; `width` is of features and of targets."""
        self.flush()
        moments = (self.moments or Moments.none(*width)).summed(partial(_summed, accelerator))
        self.moments = moments if moments.count else None
        self.scored = gather_object(self.scored)

    def scored_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and targets in the order of the rows' numbers, whatever batches they came in."""
        numbers, features, targets = map(np.concatenate, zip(*self.scored, strict=True))
        order = np.argsort(numbers)
        return features[order], targets[order]


def _summed(accelerator: Any, array: np.ndarray) -> np.ndarray:
    """The sum of an array over the processes."""
    return accelerator.reduce(torch.from_numpy(array).to(accelerator.device), "sum").cpu().numpy()


class Statistics:
    """Sums over any number of rows that the closed form needs, in constant memory."""

    def __init__(self, compression_tokens: int, hidden: int) -> None:
        """For hidden states `[N, compression_tokens, hidden]`."""
        self._rows = 0
        self._sums = np.zeros((compression_tokens, hidden))
        self._squares = 0.0
        self._folds = [_Fold() for _ in range(FOLDS)]

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: Sequence[int], states: States, targets: np.ndarray) -> None:
        """Add B rows; raises TrainingError if a value is not finite.

        Args:
            rows: their numbers, counted from 0 over all that will be added; they decide the folds.
            states: of these rows.
            targets: `[B, e]`.
        """
        _check_finite(rows, states, targets)
        numbers = np.asarray(rows)
        self._rows += len(numbers)
        self._sums += states.sums
        self._squares += states.squares
        for number, fold in enumerate(self._folds):
            at = numbers % FOLDS == number
            if at.any():
                fold.add(numbers[at], states.features[at], targets[at])

    def combine(self, accelerator: Any, width: int) -> None:
        """Make these the statistics of the rows of all processes; targets have `width` dimensions."""
        if accelerator.num_processes > 1:
            counts = _summed(accelerator, np.array([float(self._rows), self._squares]))
            self._rows, self._squares = int(counts[0]), float(counts[1])
            self._sums = _summed(accelerator, self._sums)
            for fold in self._folds:
                fold.combine(accelerator, (self._sums.shape[1], width))

    @property
    def position_means(self) -> np.ndarray:
        """Mean hidden state at each compression token `[n, d]`."""
        return self._sums / self._rows

    @property
    def spread(self) -> float:
        """Root mean square distance of hidden states from the mean over rows and positions; 0 if it is rounding."""
        mean = self.position_means.mean(0)
        square = float(self._squares / (self._rows * len(self._sums)) - mean @ mean)
        return square**0.5 if square > LEAST_SPREAD * float(mean @ mean) else 0.0

    def folds(self) -> list[tuple[Moments, np.ndarray, np.ndarray]]:
        """Moments, scored features and scored targets of each fold that has rows."""
        result = []
        for fold in self._folds:
            fold.flush()
            if fold.moments is not None:
                result.append((fold.moments, *fold.scored_rows()))
        return result

    def scored_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Features `[N, d]` and targets `[N, e]` of the rows that are kept whole, at most `FOLDS * SCORED_ROWS`."""
        _, features, targets = zip(*self.folds(), strict=True)
        return np.concatenate(features), np.concatenate(targets)


def _check_finite(rows: Sequence[int], states: States, targets: np.ndarray) -> None:
    finite = np.isfinite(states.features).all(1) & np.isfinite(targets).all(1)
    if not finite.all():
        wrong = [rows[index] for index in np.flatnonzero(~finite)]
        raise TrainingError(f"hidden states or targets of rows {wrong[:5]} are not finite")


def accumulate(
    statistics: Statistics,
    rows: TrainingRows,
    chosen: Sequence[int] | np.ndarray,
    passes: RowPasses,
    targets: Any = None,
) -> Statistics:
    """Add the chosen rows, in one query pass that the processes share; returns the statistics of them all.

    `targets` `[N, e]` of all rows, in place of those of the responses.
    """
    targets = rows.targets if targets is None else targets
    for numbers, states in passes.read(rows, chosen):
        # While the device reads a pass, the sums of the one before are taken on the host.
        statistics.add(numbers, states, targets[[chosen[number] for number in numbers]])
    statistics.combine(passes.accelerator, rows.width)
    return statistics


def choose_strength(folds: Sequence[tuple[Moments, np.ndarray, np.ndarray]], by: LinearMap) -> float:
    """The strength whose maps retrieve best: mean reciprocal rank of the own target within left-out folds.

    Squared error would choose a stronger one, whose embeddings are closer to all targets and so retrieve less well.
    `by` maps features to what the ridge sees.
    """
    scores = np.zeros(len(STRENGTHS))
    for left_out, (_, features, targets) in enumerate(folds):
        inside = [moments for at, (moments, _, _) in enumerate(folds) if at != left_out]
        if inside:
            maps = fit_ridge(reduce(add, inside).mapped(by), STRENGTHS)
            scores += [rank_own(fitted(by(features)), targets).mrr for fitted in maps]
    return STRENGTHS[int(scores.argmax())]


def closed_form(
    folds: Sequence[tuple[Moments, np.ndarray, np.ndarray]], by: LinearMap, strength: float | Literal["auto"] = "auto"
) -> tuple[LinearMap, float]:
    """Ridge regression of the targets on features that `by` maps, over all folds, and its strength."""
    used = choose_strength(folds, by) if strength == "auto" else strength
    [found] = fit_ridge(reduce(add, (moments for moments, _, _ in folds)).mapped(by), [used])
    return found, used


def frame_rows(input_embeddings: np.ndarray, prompt_ids: Sequence[int], count: int) -> np.ndarray:
    """Embeddings `[count, d]` of the last `count` tokens of a prompt; where it is shorter, the mean row before them.

    `input_embeddings` `[V, d]` are as the backbone's first layer sees them.
    """
    ids = list(prompt_ids)[-count:]
    mean = np.repeat(input_embeddings.mean(0, keepdims=True), count - len(ids), axis=0)
    return np.concatenate([mean, input_embeddings[ids]])


def fit_reconstruction(means: np.ndarray, spread: float, frame: np.ndarray, input_norm: float) -> LinearMap:
    """The map whose soft prompts are, on average at each position, the frame, and vary as the hidden states do.

    A scaled identity carries the variation; the smallest correction that moves the n mean soft prompts onto the frame
    has rank n - 1. Positions with like hidden states (new tokens that start as the same row) could be separated only by
    amplifying small differences: they meet the frame only as far as `LEAST_OFFSET` allows.

    Args:
        means: mean hidden state at each position `[n, d]`, as is `frame`.
        spread: root mean square distance of hidden states from their mean.
        input_norm: mean norm of input embeddings; the variation gets `SPREAD` of it.
    """
    scale = SPREAD * input_norm / spread
    centred = means - means.mean(0)
    missing = frame - frame.mean(0) - scale * centred
    smallest = LEAST_OFFSET * spread / (np.linalg.norm(centred, ord=2) + 1e-12)
    weight = scale * np.eye(means.shape[1]) + (np.linalg.pinv(centred, rcond=smallest) @ missing).T
    return LinearMap(weight, frame.mean(0) - weight @ means.mean(0))


def warm_start(
    student: Student, statistics: Statistics, frame: np.ndarray, input_norm: float, strength: float | Literal["auto"]
) -> float:
    """Set both projections in closed form; returns the strength of the ridge ("auto": see `choose_strength`).

    Args:
        student: changed in place.
        statistics: of the training rows, see `accumulate`.
        frame: `[n, d]`, see `frame_rows`.
        input_norm: mean norm of the backbone's input embeddings.

    Raises:
        TrainingError: the hidden states are all the same, as those of one row at one token are.
    """
    if not statistics.spread:
        raise TrainingError(
            f"the hidden states at {student.compression_tokens} compression tokens of {len(statistics)} training "
            "queries do not differ: add queries, or set false for a random start",
            argument="warm_start.enabled",
        )
    reconstruction = fit_reconstruction(statistics.position_means, statistics.spread, frame, input_norm)
    alignment, used = closed_form(statistics.folds(), reconstruction, strength)
    reconstruction.write_to(student.reconstruction)
    alignment.write_to(student.alignment)
    log.info("warm start: ridge %g over %d rows", used, len(statistics))
    return used
