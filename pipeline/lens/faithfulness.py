"""How faithful a decoded text is: its cosines in the teacher's space, compared with those of shuffled pairs.

A high cosine to the student's embedding: the text says what the embedding encodes; to the teacher's embedding of the
real response: it says what the backbone would have answered. Teachers differ in how similar unrelated texts are, so
each cosine is compared with the mean cosine of the decoded text to the counterparts of all other rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.bootstrap import BootstrapParams, Delta, delta_of, paired_delta, sample_means
from pipeline.core.errors import EvaluationError
from pipeline.core.vectors import unit_rows

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

CHANCE = "chance"


@dataclass(frozen=True)
class PairCosines:
    """Cosines of N pairs, float32 `[N]`.

    `chance` is the mean cosine of each first to the seconds of all other pairs; NaN for a single pair.
    """

    own: Array
    chance: Array


class Summary(NamedTuple):
    """Mean cosine, its bootstrap interval (None without one), and the mean of shuffled pairs (None for one pair)."""

    mean: float
    low: float | None
    high: float | None
    chance: float | None


def pair(first: Array, second: Array) -> PairCosines:
    """Compare each row of `[N, e]` with that of another `[N, e]`; a zero vector has cosine 0 to all."""
    a, b = unit_rows(first.astype(np.float64)), unit_rows(second.astype(np.float64))
    own = (a * b).sum(axis=1)
    others = len(a) - 1
    chance = (a @ b.sum(axis=0) - own) / others if others else np.full(len(a), np.nan)
    return PairCosines(own.astype(np.float32), chance.astype(np.float32))


def summary(metric: str, pairs: PairCosines, settings: BootstrapParams) -> Summary:
    """The mean over pairs with its interval; the resamples depend on `metric` and the seed."""
    interval = delta_of(metric, "", sample_means(metric, pairs.own, np.zeros_like(pairs.own), settings), settings)
    shuffled = pairs.chance[np.isfinite(pairs.chance)]
    return Summary(
        mean=round(float(pairs.own.mean(dtype=np.float64)), 6),
        low=interval.low,
        high=interval.high,
        chance=round(float(shuffled.mean(dtype=np.float64)), 6) if len(shuffled) else None,
    )


def over_chance(metric: str, pairs: PairCosines, settings: BootstrapParams) -> Delta | None:
    """How far the pairs are above shuffled ones, with its interval; None if no pair could be shuffled."""
    shuffled = np.isfinite(pairs.chance)
    if not shuffled.any():
        return None
    return paired_delta(metric, CHANCE, pairs.own[shuffled], pairs.chance[shuffled], settings)


def check_teacher(identity: Mapping[str, Any], recorded: Mapping[str, Any], owner: str) -> None:
    """Compare the judging teacher with the recorded one of `owner` ("the encoder", "the targets").

    Raises EvaluationError if they differ, see `teacher_difference`.
    """
    if difference := teacher_difference(identity, recorded, owner):
        message = f"another teacher than that of {owner}: {difference}. Name the recorded one"
        raise EvaluationError(message, argument="teacher")


def teacher_difference(identity: Mapping[str, Any], recorded: Mapping[str, Any], owner: str) -> str | None:
    """In what a teacher differs from the recorded one of `owner`; None if in nothing.

    Folder names and transforms may differ; a recorded teacher without a `kind` is warned of.
    """
    if "kind" not in recorded:
        name = recorded.get("name", "unknown")
        log.warning("cannot tell whether teacher %s is the one of %s, %s", identity.get("name"), owner, name)
        return None
    ours, theirs = ({key: _pinned(value) for key, value in _pinned(each).items()} for each in (identity, recorded))
    for key in sorted((ours.keys() | theirs.keys()) - {"transform"}):
        if ours.get(key) != theirs.get(key):
            return f"its {key} is {identity.get(key)!r}, recorded is {recorded.get(key)!r}"
    return None


def _pinned(identity: Any) -> Any:
    """An identity without the names of folders, whose weights are pinned by their sha256."""
    if isinstance(identity, list):
        return [_pinned(each) for each in identity]
    if isinstance(identity, Mapping) and "sha256" in identity:
        return {key: value for key, value in identity.items() if key != "name"}
    return identity
