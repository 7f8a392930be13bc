"""From gradients to an update: AdamW over the few trained tensors, gradients summed over processes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

TOKENS = "student.tokens"


def adamw(
    trained: Mapping[str, Parameter], *, rate: float, weight_decay: float, token_rate: float | None = None
) -> Optimizer:
    """AdamW whose groups hold their peak rate as "peak"; the token rows (`TOKENS`), if any, have no weight decay.

    `token_rate` is theirs; None is `rate`. The fused kernel can leave a step out without asking the host (`update`).
    """
    others = [value for name, value in trained.items() if name != TOKENS]
    groups: list[dict[str, Any]] = [{"params": others, "peak": rate, "weight_decay": weight_decay}]
    if TOKENS in trained:
        groups.append({"params": [trained[TOKENS]], "peak": token_rate or rate, "weight_decay": 0.0})
    return AdamW(groups, lr=rate, fused=True)


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Every group's rate as this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]


def update(optimizer: Optimizer, values: Tensor) -> None:
    """A step of an optimiser of `adamw` that the device leaves out where one of `values` is not finite."""
    optimizer.found_inf = (~values.isfinite().all()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def unscale(parameters: Iterable[Parameter], scale: int) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(scale)


def sum_and_clip(parameters: Sequence[Parameter], accelerator: Any, max_norm: float) -> Tensor:
    """Sum gradients over processes and clip them in place; returns their norm before clipping, a scalar."""
    gradients = [_gradient(parameter) for parameter in parameters]
    if accelerator.num_processes > 1:
        _sum_over_processes(gradients, accelerator)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def _gradient(parameter: Parameter) -> Tensor:
    """Zeros where no row of this process gave a gradient: AdamW and the sum over processes need all."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _sum_over_processes(gradients: Sequence[Tensor], accelerator: Any) -> None:
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
