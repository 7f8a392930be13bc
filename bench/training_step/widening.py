"""float64 all the way: library code that asks for float32 gets float64."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Inside, `torch.float32` names float64 and `.float()` is `.double()`; new tensors are float64.

    Models normalise, rotate and take the cross-entropy in float32 whatever their own dtype, which would hide an error
    of 1e-9 under a rounding of 1e-7. Both sides are compared inside this block, so neither's code is changed. Enter it
    when the weights are loaded: files hold the real float32.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
