"""Checkpointed layers: fewer tensors kept, nothing of the model changed."""

from typing import Any

import pytest
import torch

from pipeline.core.errors import BackboneError
from pipeline.encoder.passes.activation_checkpointing import checkpointable_layers
from pipeline.encoder.passes.plain import plain_passes
from pipeline.encoder.passes.select import make_passes
from tests.conftest import tiny_model
from tests.encoder.passes.exact_models import difference, exact_model, loss_and_gradients

RESPONSES = [list(range(60, 100)), [7, 2]]


def kept_bytes(passes: Any) -> int:
    """What the response pass keeps for its backward pass, weights not counted."""
    soft_prompts = torch.randn(2, 3, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        passes.response_pass(soft_prompts, RESPONSES)
    return sum(kept.values())


def test_checkpointed_layers_keep_little_more_than_their_inputs() -> None:
    model = tiny_model()
    layers, tokens, width = 3, 2 * 3 + 42, 32
    inputs = layers * tokens * width * 4
    assert kept_bytes(make_passes(model)) > 5 * inputs
    assert kept_bytes(make_passes(model, checkpoint_responses=True)) < 2 * inputs


def test_the_model_is_as_before_during_and_after() -> None:
    model = exact_model("gemma3")
    forwards = [layer.forward for layer in checkpointable_layers(model)]
    passes = make_passes(model, checkpoint_responses=True)
    found = loss_and_gradients(model, passes, [[5, 6], [7]], RESPONSES)
    expected = loss_and_gradients(model, plain_passes(model), [[5, 6], [7]], RESPONSES)
    assert max(difference(found, expected).values()) < 1e-9
    assert [layer.forward for layer in checkpointable_layers(model)] == forwards
    assert not any("forward" in vars(layer) for layer in checkpointable_layers(model))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.modules())


def test_a_backward_pass_in_parts_and_out_of_order() -> None:
    """Two micro-batches run forward before either runs backward: each recomputes with its own packed row."""
    model = exact_model("qwen3")
    soft = [torch.randn(1, 3, 32).double().requires_grad_() for _ in range(2)]
    passes = make_passes(model, checkpoint_responses=True)
    losses = [passes.response_pass(prompts, [ids])[0] for prompts, ids in zip(soft, RESPONSES, strict=True)]
    sum(losses, torch.zeros(())).backward()
    for prompts, ids in zip(soft, RESPONSES, strict=True):
        alone = prompts.detach().requires_grad_()
        plain_passes(model).response_pass(alone, [ids])[0].backward()
        torch.testing.assert_close(prompts.grad, alone.grad, rtol=1e-9, atol=1e-12)


def test_a_backbone_without_marked_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "get_decoder", lambda: torch.nn.Linear(2, 2))
    with pytest.raises(BackboneError, match="LlamaForCausalLM has no layers that can be checkpointed"):
        checkpointable_layers(model)
