"""How faithful a decoded text is: cosines in the teacher's space, beside what chance would give.

The teacher embeds the decoded text. Near to the student's embedding: the text says what the embedding says. Near to the
teacher's embedding of the real response: the text says what the backbone would have answered. Teachers differ in how
near any two texts are to each other, so a cosine is read against that of shuffled pairs: each decoded text with every
row's counterpart but its own, a mean over all of them and so the same at every run.
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
class Paired:
    """Cosines float32 `[N]` of N pairs, and of each first with the seconds of all other pairs on average.

    The latter is NaN where there was no other pair to shuffle with.
    """

    own: Array
    chance: Array


class Summary(NamedTuple):
    """Mean cosine, the ends of its bootstrap interval (None without one), mean of shuffled pairs (None of one pair)."""

    mean: float
    low: float | None
    high: float | None
    chance: float | None


def pair(first: Array, second: Array) -> Paired:
    """Compare rows of `[N, e]` with rows of `[N, e]`, of any length; a zero vector is at cosine 0 to all.

    With one pair there is nothing to shuffle: its chance is NaN.
    """
    a, b = unit_rows(first.astype(np.float64)), unit_rows(second.astype(np.float64))
    own = (a * b).sum(axis=1)
    others = len(a) - 1
    chance = (a @ b.sum(axis=0) - own) / others if others else np.full(len(a), np.nan)
    return Paired(own.astype(np.float32), chance.astype(np.float32))


def summary(metric: str, pairs: Paired, settings: BootstrapParams) -> Summary:
    """The mean over pairs with its interval; `metric` and the seed decide what is drawn."""
    interval = delta_of(metric, "", sample_means(metric, pairs.own, np.zeros_like(pairs.own), settings), settings)
    shuffled = pairs.chance[np.isfinite(pairs.chance)]
    return Summary(
        mean=round(float(pairs.own.mean(dtype=np.float64)), 6),
        low=interval.low,
        high=interval.high,
        chance=round(float(shuffled.mean(dtype=np.float64)), 6) if len(shuffled) else None,
    )


def over_chance(metric: str, pairs: Paired, settings: BootstrapParams) -> Delta | None:
    """How far the pairs are above shuffled ones, and whether that is more than noise.

    Pairs that there was nothing to shuffle with do not count; None if that is so of all.
    """
    shuffled = np.isfinite(pairs.chance)
    if not shuffled.any():
        return None
    return paired_delta(metric, CHANCE, pairs.own[shuffled], pairs.chance[shuffled], settings)


def check_teacher(found: Mapping[str, Any], recorded: Mapping[str, Any], whose: str) -> None:
    """Compare a teacher with the recorded one; where nothing pins that, a warning says so.

    Args:
        found: identity of the teacher that is to judge.
        recorded: identity of the one that the targets were made by, as the encoder or its targets record it.
        whose: "the encoder", "the targets".

    Raises:
        EvaluationError: they differ; a folder may lie elsewhere, and by which transform its vectors go on is not asked.
    """
    if "kind" not in recorded:
        name = recorded.get("name", "unknown")
        log.warning("nothing tells whether %s (embed.teacher) is the teacher of %s, %s", found.get("name"), whose, name)
        return
    ours, theirs = ({key: _pinned(value) for key, value in _pinned(each).items()} for each in (found, recorded))
    for key in sorted((ours.keys() | theirs.keys()) - {"transform"}):
        if ours.get(key) != theirs.get(key):
            raise EvaluationError(
                f"embed.teacher is another teacher than that of {whose}: its {key} is {found.get(key)!r}, there it is "
                f"{recorded.get(key)!r}: cosines would mean nothing; name that teacher in the params"
            )


def _pinned(identity: Any) -> Any:
    """An identity without names of folders, whose weights are pinned by their sha256."""
    if isinstance(identity, list):
        return [_pinned(each) for each in identity]
    if isinstance(identity, Mapping) and "sha256" in identity:
        return {key: value for key, value in identity.items() if key != "name"}
    return identity
