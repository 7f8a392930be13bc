"""Per-query, per-pair or per-text results of a task, from which its score can be computed again on resamples.

A resample is given as counts: how often each unit was drawn. Each score is a ratio of weighted sums, computed for a
block of resamples at once; ranks among the drawn units, duplicates included, come from cumulated counts.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.files import write_bytes

Floats = NDArray[np.float64]
Kind = Literal["mean", "spearman", "ap", "f1"]


@dataclass(frozen=True)
class UnitScores:
    """The units of one split and subset of a task.

    Attributes:
        unit: what is resampled: "query", "pair", "text", "run" (of a clustering or a classifier).
        key: digest of the units; two systems are paired only where it is equal.
        gold: [N], the right answers; empty for "mean".
        predicted: "mean": scores [N]; "spearman": similarities [N]; "ap": similarities by K measures [K, N], the best
            of which counts; "f1": classes by E classifiers [E, N], over which the macro F1 is averaged.
    """

    split: str
    subset: str
    unit: str
    key: str
    kind: Kind
    gold: NDArray[Any]
    predicted: NDArray[Any]

    @property
    def units(self) -> int:
        return int(self.predicted.shape[-1])

    def score(self) -> float:
        return float(self.scores(np.ones((1, self.units)))[0])

    def scores(self, counts: Floats) -> Floats:
        """The score on resamples that draw each unit `counts` times, [B, N]: float64 [B], NaN where it is undefined."""
        match self.kind:
            case "mean":
                return np.asarray(counts @ self.predicted / counts.sum(axis=1))
            case "spearman":
                return _spearman(self.gold, self.predicted, counts)
            case "ap":
                return np.max([_average_precision(self.gold, row, counts) for row in self.predicted], axis=0)
            case "f1":
                return np.mean([_macro_f1(self.gold, row, counts) for row in self.predicted], axis=0)


# Of the student, in the artifact of a suite: a file a task.
UNIT_SCORES_DIR = "unit_scores"


def save(path: Path, unit_scores: Sequence[UnitScores]) -> None:
    """Write `to_bytes` atomically; raises WorkError if the disk is full."""
    write_bytes(path, to_bytes(unit_scores))


def to_bytes(unit_scores: Sequence[UnitScores]) -> bytes:
    """As a NumPy archive; equal unit scores give equal bytes."""
    header, arrays = [], {}
    for index, part in enumerate(unit_scores):
        facts = asdict(part)
        arrays[f"gold-{index}"], arrays[f"found-{index}"] = facts.pop("gold"), facts.pop("predicted")
        header.append(facts)
    content = io.BytesIO()
    np.savez_compressed(content, header=np.array(json.dumps(header)), **arrays)
    return content.getvalue()


def load(path: Path) -> list[UnitScores] | None:
    """A task's unit scores; None if the file is missing or damaged."""
    try:
        return from_bytes(path.read_bytes())
    except OSError:
        return None


def from_bytes(content: bytes) -> list[UnitScores] | None:
    """The unit scores in an archive of `to_bytes`; None if it is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            return [
                UnitScores(**facts, gold=arrays[f"gold-{index}"], predicted=arrays[f"found-{index}"])
                for index, facts in enumerate(header)
            ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def as_counts(indices: NDArray[np.int64]) -> Floats:
    """How often each of N units is drawn, float64 [B, N], from the drawn units [B, N]."""
    rows, units = indices.shape
    flat = (indices + units * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * units).reshape(rows, units).astype(np.float64)


def _ranks(values: NDArray[Any], counts: Floats) -> Floats:
    """Mid-rank of each unit's value among the drawn ones, [B, N]."""
    group, starts = _groups(values)
    drawn = np.add.reduceat(counts[:, np.argsort(group, kind="stable")], starts, axis=1)
    middle = np.cumsum(drawn, axis=1) - drawn / 2
    return np.asarray(middle[:, group])


def _groups(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The group of equal values that each unit is in, by rising value, and where each group starts when sorted."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return group, np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _spearman(gold: NDArray[Any], predicted: NDArray[Any], counts: Floats) -> Floats:
    centre = counts.sum(axis=1, keepdims=True) / 2
    ours, theirs = _ranks(gold, counts) - centre, _ranks(predicted, counts) - centre
    covariance = (counts * ours * theirs).sum(axis=1)
    spread = (counts * ours**2).sum(axis=1) * (counts * theirs**2).sum(axis=1)
    return _ratio(covariance, np.sqrt(spread))


def _average_precision(gold: NDArray[Any], predicted: NDArray[Any], counts: Floats) -> Floats:
    group, starts = _groups(-predicted)
    order = np.argsort(group, kind="stable")
    drawn = np.cumsum(np.add.reduceat(counts[:, order], starts, axis=1), axis=1)
    right = np.cumsum(np.add.reduceat((counts * gold)[:, order], starts, axis=1), axis=1)
    precision = right / np.maximum(drawn, 1)
    return _ratio((np.diff(right, axis=1, prepend=0) * precision).sum(axis=1), right[:, -1])


def _macro_f1(gold: NDArray[Any], predicted: NDArray[Any], counts: Floats) -> Floats:
    classes = np.unique(np.concatenate([gold, predicted]))
    is_gold, is_predicted = gold[:, None] == classes, predicted[:, None] == classes
    right = counts @ (is_gold & is_predicted).astype(np.float64)
    seen = counts @ is_gold.astype(np.float64) + counts @ is_predicted.astype(np.float64)
    return np.asarray((2 * right / np.maximum(seen, 1)).sum(axis=1) / (seen > 0).sum(axis=1))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
