"""Closed-form start of the projections, so that minutes of training are enough on a small machine.

The embedding is linear in the soft prompts, so the best linear map to the targets needs no gradient: ridge regression.
The soft prompts start as the embeddings of a frame, the tokens with which the backbone's chat template opens an answer,
plus the hidden states at half an input embedding's norm: the backbone then begins an answer at once, and the
reconstruction loss starts where it would for an empty question. The paper starts both projections at random.
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
SPREAD = 0.5


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


def frame_rows(input_embeddings: np.ndarray, prompt_ids: Sequence[int], count: int) -> np.ndarray:
    """Embeddings `[count, d]` of the last `count` tokens of a prompt; where it is shorter, the mean row before them.

    Args:
        input_embeddings: `[V, d]` as the backbone's first layer sees them.
        prompt_ids: a prompt without a question; an empty one gives mean rows.
        count: n compression tokens.
    """
    kept = list(prompt_ids)[-count:]
    mean = np.repeat(input_embeddings.mean(0, keepdims=True), count - len(kept), axis=0)
    return np.concatenate([mean, input_embeddings[kept]])


def fit_reconstruction(hidden: np.ndarray, frame: np.ndarray, input_norm: float) -> LinearMap:
    """The map whose soft prompts are, on average at each position, the frame, and vary as the hidden states do.

    A scaled identity carries the variation; the smallest correction that moves the n mean soft prompts onto the frame
    has rank n - 1.

    Args:
        hidden: `[N, n, d]`.
        frame: `[n, d]`.
        input_norm: mean norm of input embeddings; the variation gets `SPREAD` of it.
    """
    means = hidden.mean(0).astype(np.float64)
    scale = SPREAD * input_norm / np.linalg.norm(hidden - hidden.mean((0, 1)), axis=-1).mean()
    centred = means - means.mean(0)
    missing = frame - frame.mean(0) - scale * centred
    weight = scale * np.eye(hidden.shape[-1]) + (np.linalg.pinv(centred, rcond=1e-6) @ missing).T
    return LinearMap(weight, frame.mean(0) - weight @ means.mean(0))


@torch.no_grad()
def warm_start(
    student: Student,
    hidden: np.ndarray,
    targets: np.ndarray,
    frame: np.ndarray,
    input_norm: float,
    strength: float | Literal["auto"],
) -> float:
    """Set both projections in closed form.

    Args:
        student: changed in place.
        hidden: `[N, n, d]` hidden states at the compression tokens of the training queries.
        targets: `[N, e]`.
        frame: `[n, d]`, see `frame_rows`.
        input_norm: mean norm of the backbone's input embeddings.
        strength: of the ridge; "auto" chooses it by `choose_strength`.

    Returns:
        The strength used.
    """
    reconstruction = fit_reconstruction(hidden, frame, input_norm)
    features = reconstruction(hidden.mean(axis=1))
    used = choose_strength(features, targets) if strength == "auto" else strength
    [alignment] = fit_ridge(features, targets, [used])
    for layer, fitted in ((student.reconstruction, reconstruction), (student.alignment, alignment)):
        layer.weight.copy_(torch.from_numpy(fitted.weight))
        layer.bias.copy_(torch.from_numpy(fitted.bias))
    log.info("warm start: ridge %g over %d rows", used, len(hidden))
    return used
