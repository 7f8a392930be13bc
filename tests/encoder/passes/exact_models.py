"""Tiny backbones whose arithmetic is float64 all the way, and the loss and gradients of passes on them."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from pipeline.encoder.passes.plain import Passes
from pipeline.encoder.student import new_student
from tests.conftest import SMALL_CONFIG, tiny_model

Ids = Sequence[Sequence[int]]


def exact_model(architecture: str, **config: Any) -> Any:
    """A random causal LM in float64 with weights large enough that every part of it matters."""
    return sharpened(tiny_model(architecture) if not config else configured(architecture, **config)).double()


def sharpened(model: Any) -> Any:
    """The model with larger weights, and norms that do not cut to float32 as transformers' own do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_exact_norm, module)
    return model


def _exact_norm(module: Any, hidden: Tensor) -> Tensor:
    gemma = "Gemma" in type(module).__name__
    epsilon = module.eps if gemma else module.variance_epsilon
    scaled = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    return scaled * (1 + module.weight if gemma else module.weight)


def configured(architecture: str, **settings: Any) -> Any:
    """A tiny random causal LM with other settings, in float32; eager attention where scores are soft-capped."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**SMALL_CONFIG, **settings})
    torch.manual_seed(0)
    attention = "eager" if settings.get("attn_logit_softcapping") else None
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def loss_and_gradients(
    model: Any, passes: Passes, queries: Ids, responses: Ids, *, thought_tokens: int = 2
) -> dict[str, Tensor]:
    """Both losses added up, and the gradient of each trained tensor."""
    student = new_student(model, 5, compression_tokens=3, thought_tokens=thought_tokens, seed=0).to(model.dtype)
    soft_prompts = student.soft_prompts(passes.query_pass(queries, student.tokens, 3))
    loss, count = passes.response_pass(soft_prompts, responses)
    assert count == sum(map(len, responses))
    total = loss / count + student.embedding(soft_prompts).square().sum()
    total.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"loss": total.detach(), **{name: value for name, value in gradients.items() if value is not None}}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss and of each gradient: the largest difference, relative to the largest value."""
    assert found.keys() == expected.keys()
    compare: Callable[[str], float] = lambda name: float(  # noqa: E731
        (found[name] - expected[name]).abs().max() / expected[name].abs().max()
    )
    return {name: compare(name) for name in expected}
