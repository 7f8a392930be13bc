"""Tensors that the host reads later than the device makes them, so that neither waits for the other."""

import torch
from torch import Tensor


class HostCopy:
    """A copy to the host that begins as soon as the device has computed the values."""

    def __init__(self, values: Tensor) -> None:
        """Nothing waits here."""
        self._copied = None
        self._values = values.detach()
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tensor:
        """The values; waits for what was launched before the copy, not for what was launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
