"""Closed-form start of the projections, so that minutes of training are enough on a small machine.

The embedding is linear in the hidden states at the compression tokens, so its best linear map to the targets needs no
gradient: ridge regression on the mean hidden state. The reconstruction projection starts as the identity scaled to the
norm of input embeddings (soft prompts then look like inputs to the backbone), and the scale is divided out of the
alignment projection. The paper starts at random.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from pipeline.encoder.student import Student

log = logging.getLogger(__name__)

_STRENGTHS = np.logspace(0, 6, 25)


@dataclass(frozen=True)
class LinearMap:
    """`y = x @ weight.T + bias` with weight `[e, d]` and bias `[e]`, float64, and the ridge strength it came from."""

    weight: np.ndarray
    bias: np.ndarray
    ridge: float


def fit_ridge(features: np.ndarray, targets: np.ndarray, strength: float | Literal["auto"]) -> LinearMap:
    """Ridge regression on standardised features, returned as a map of the raw features.

    Args:
        features: `[N, d]`.
        targets: `[N, e]`.
        strength: penalty on the standardised coefficients; "auto" chooses by generalised cross-validation.
    """
    scaler = StandardScaler()
    standardised = scaler.fit_transform(features.astype(np.float64))
    model = RidgeCV(_STRENGTHS) if strength == "auto" else Ridge(strength)
    model.fit(standardised, targets.astype(np.float64))
    coefficients = np.atleast_2d(model.coef_)
    weight = coefficients / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    return LinearMap(weight, bias, float(model.alpha_ if strength == "auto" else strength))


@torch.no_grad()
def warm_start(
    student: Student,
    hidden: np.ndarray,
    targets: np.ndarray,
    input_norm: float,
    strength: float | Literal["auto"],
) -> float:
    """Set both projections in closed form.

    Args:
        student: changed in place.
        hidden: `[N, n, d]` hidden states at the compression tokens of the training queries.
        targets: `[N, e]`.
        input_norm: mean norm of the backbone's input embeddings.
        strength: see `fit_ridge`.

    Returns:
        The ridge strength used.
    """
    scale = input_norm / float(np.linalg.norm(hidden, axis=-1).mean())
    fitted = fit_ridge(hidden.mean(axis=1), targets, strength)
    student.reconstruction.weight.copy_(scale * torch.eye(student.hidden))
    student.reconstruction.bias.zero_()
    student.alignment.weight.copy_(torch.from_numpy(fitted.weight / scale))
    student.alignment.bias.copy_(torch.from_numpy(fitted.bias))
    log.info("warm start: ridge %.3g over %d rows, soft prompts scaled by %.3g", fitted.ridge, len(hidden), scale)
    return fitted.ridge
