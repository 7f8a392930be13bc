"""A block in which GPU code runs on the fake GPU: what it would compute, and what only a real GPU has, is replaced.

    values read from a tensor    `meter.ANSWERS`; arrays and lists are zeros
    indices, padded token ids    computed for real on the host: sizes depend on them
    the end of an answer         after `ANSWER_TOKENS`
    fused functions, attention   the kernels that they become (`stand_ins`)
    pinned memory                the memory as it is

Everything else is the code that a GPU runs, comparisons with the plain passes included: their differences are read as
small numbers, so the fastest candidate that runs is chosen.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest import mock

import numpy as np

from bench.fake_gpu import stand_ins
from bench.fake_gpu.device import DEVICE
from bench.fake_gpu.meter import Meter

ANSWER_TOKENS = 4


@contextmanager
def simulated(mode: Any, meter: Meter) -> Iterator[None]:
    """Inside the block the fake GPU is the best device, and `meter` counts.

    Args:
        mode: the `FakeTensorMode` of all tensors.
    """
    from pipeline.core.run import DEVICE_VARIABLE

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {DEVICE_VARIABLE: DEVICE}))
        for owner, name, new in _replacements(meter):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(mode)
        stack.enter_context(meter)
        yield


def _replacements(meter: Meter) -> Iterator[tuple[Any, str, Any]]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import _disable_current_modes
    from transformers import GenerationMixin
    from transformers.utils import import_utils

    from pipeline.backbone import device, fused, prompting
    from pipeline.backbone.attention import segments

    equals, numpy = fused.equals, torch.Tensor.numpy

    def on_the_host(make: Callable[..., Any]) -> Callable[..., Any]:
        def real(*arguments: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return make(*arguments, **options)

        return real

    def host_array(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return _zeros(tensor) if isinstance(tensor, FakeTensor) else numpy(tensor, *arguments, **options)

    def host_list(tensor: Any) -> Any:
        meter.read(tensor)
        return np.zeros(tuple(tensor.shape)).astype(int).tolist()

    yield device, "check_usable", lambda _: None
    yield torch.nn.Module, "_apply", _apply
    yield torch.Tensor, "numpy", host_array
    yield FakeTensor, "tolist", host_list
    yield torch.Tensor, "pin_memory", lambda tensor, *_: tensor
    for random_state in ("get_rng_state", "set_rng_state"):
        yield torch.cuda, random_state, lambda *_: None
    yield torch.nn.functional, "rms_norm", stand_ins.rms_norm
    yield torch.nn.functional, "scaled_dot_product_attention", stand_ins.attention
    yield segments, "_tokens", on_the_host(segments._tokens)
    yield prompting, "_pad", on_the_host(prompting._pad)
    yield fused, "compiled", stand_ins.stand_in
    # It multiplies by one more than its weight: the values would differ.
    yield fused, "equals", lambda module, forward: type(module).__name__ != "Gemma3RMSNorm" and equals(module, forward)
    steps = count(1)
    yield GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: bool(next(steps) % (ANSWER_TOKENS + 1))
    # transformers looks at the values of a mask unless its tensors are fake; a GPU's are not.
    yield import_utils, "is_fake_tensor", lambda _: False


def _apply(module: Any, convert: Any, recurse: bool = True) -> Any:
    """For `Module.to` and others, which change tensors in place: those of fake ones cannot be changed."""
    import torch

    for child in module.children() if recurse else ():
        _apply(child, convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = convert(parameter)
            if moved is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _zeros(tensor: Any) -> Any:
    """What `numpy()` gives; raises TypeError where it would for a real tensor."""
    import torch

    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy: copy it to the host first")
    if tensor.dtype == torch.bfloat16:
        raise TypeError("numpy has no bfloat16")
    return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
