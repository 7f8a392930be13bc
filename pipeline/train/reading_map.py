"""The map that decorrelates a standardised reading."""

import numpy as np

from pipeline.core.target_transform import TransformParams
from pipeline.embed.transform_fit import fit_transform
from pipeline.train.ridge import LinearMap


def decorrelation(readings: np.ndarray, params: TransformParams) -> LinearMap:
    """What kind standardize does to standardised readings `[N, d]`: with `decorrelate` it takes correlation away."""
    found = fit_transform(params, [readings], unit_length=False).transform
    forward = found.forward.astype(np.float64)
    return LinearMap(forward.T, -found.mean.astype(np.float64) @ forward)
