"""Where sums must not be taken in half precision."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or as they are where that is more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
