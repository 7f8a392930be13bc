"""Closed-form start of the projections, so that minutes of training are enough on a small machine.

The embedding is linear in the hidden states at the compression tokens, so the best linear map to the targets needs no
gradient: ridge regression on the mean hidden state. The reconstruction projection starts as a scaled identity that puts
the soft prompts around the mean input embedding, at a quarter of an input embedding's norm: the backbone then reads
something like an average word, and the reconstruction loss starts near 2 instead of 7. The alignment projection undoes
the scale. The paper starts both at random.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeline.encoder.student import Student

log = logging.getLogger(__name__)

STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)
FOLDS = 5
SPREAD = 0.25


@dataclass(frozen=True)
class LinearMap:
    """`y = x @ weight.T + bias` with weight `[e, d]` and bias `[e]`, float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """`[N, e]` of features `[N, d]`."""
        return features @ self.weight.T + self.bias


def fit_ridge(features: np.ndarray, targets: np.ndarray, strengths: Sequence[float]) -> Iterator[LinearMap]:
    """Ridge regression with an intercept on standardised features, as a map of the raw ones; one map a strength.

    One eigendecomposition serves all strengths.

    Args:
        features: `[N, d]`.
        targets: `[N, e]`.
        strengths: penalties on the coefficients of the standardised features.
    """
    mean, spread, centre = features.mean(0), features.std(0) + 1e-9, targets.mean(0)
    standardised = ((features - mean) / spread).astype(np.float64)
    values, vectors = np.linalg.eigh(standardised.T @ standardised)
    projected = vectors.T @ (standardised.T @ (targets - centre).astype(np.float64))
    for strength in strengths:
        weight = (vectors @ (projected / (values + strength)[:, None])).T / spread
        yield LinearMap(weight, centre - weight @ mean)


def choose_strength(features: np.ndarray, targets: np.ndarray) -> float:
    """The strength whose maps retrieve best: mean reciprocal rank of the own target within left-out folds.

    Squared error would choose a stronger one, which brings embeddings closer to all targets and so tells them apart
    less well.
    """
    fold = np.arange(len(features)) % FOLDS
    scores = np.zeros(len(STRENGTHS))
    for left_out in range(FOLDS):
        inside, outside = fold != left_out, fold == left_out
        maps = fit_ridge(features[inside], targets[inside], STRENGTHS)
        scores += [reciprocal_rank(fitted(features[outside]), targets[outside]) for fitted in maps]
    return STRENGTHS[int(scores.argmax())]


def reciprocal_rank(embeddings: np.ndarray, targets: np.ndarray) -> float:
    """Mean reciprocal rank by cosine of each row's own target among all targets."""
    first, second = (rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12) for rows in (embeddings, targets))
    cosines = first @ second.T
    return float((1.0 / (cosines >= np.diagonal(cosines)[:, None]).sum(axis=1)).mean())


@torch.no_grad()
def warm_start(
    student: Student,
    hidden: np.ndarray,
    targets: np.ndarray,
    input_embeddings: np.ndarray,
    strength: float | Literal["auto"],
) -> float:
    """Set both projections in closed form.

    Args:
        student: changed in place.
        hidden: `[N, n, d]` hidden states at the compression tokens of the training queries.
        targets: `[N, e]`.
        input_embeddings: `[V, d]` as the backbone's first layer sees them.
        strength: of the ridge; "auto" chooses it by `choose_strength`.

    Returns:
        The strength used.
    """
    features = hidden.mean(axis=1)
    used = choose_strength(features, targets) if strength == "auto" else strength
    [fitted] = fit_ridge(features, targets, [used])
    centred = hidden - features.mean(0)
    scale = SPREAD * np.linalg.norm(input_embeddings, axis=-1).mean() / np.linalg.norm(centred, axis=-1).mean()
    shift = input_embeddings.mean(0) - scale * features.mean(0)
    weight = fitted.weight / scale
    student.reconstruction.weight.copy_(float(scale) * torch.eye(student.hidden))
    student.reconstruction.bias.copy_(torch.from_numpy(shift))
    student.alignment.weight.copy_(torch.from_numpy(weight))
    student.alignment.bias.copy_(torch.from_numpy(fitted.bias - weight @ shift))
    log.info("warm start: ridge %g over %d rows, soft prompts scaled by %.3g", used, len(hidden), scale)
    return used
