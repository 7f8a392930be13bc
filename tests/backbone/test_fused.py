"""Fused kernels equal the modules that they replace, and are refused where they differ."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.backbone import fused
from pipeline.backbone.fused import FusedKernels, equals, fused_kernels
from tests.conftest import tiny_model


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Functions are not compiled: what is tested is what they compute."""
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    yield


def kernels(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> FusedKernels:
    """As if the backbone were on a GPU."""

    class Cuda:
        weight = type("W", (), {"device": torch.device("cuda")})

    monkeypatch.setattr(backbone, "get_input_embeddings", lambda: Cuda)
    found = fused_kernels(backbone)
    monkeypatch.undo()
    assert found is not None
    return found


def test_there_are_none_on_a_cpu() -> None:
    assert fused_kernels(tiny_model("llama")) is None


@pytest.mark.parametrize(
    ("architecture", "norms", "gates"),
    [("llama", 7, 3), ("qwen3", 13, 3), ("olmo2", 13, 3), ("phi3", 7, 0), ("gemma3", 0, 3)],
)
def test_a_backbone_computes_the_same_with_them(
    architecture: str, norms: int, gates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two norms in each of three layers and one at the end; two more a layer for heads. Gemma's norm is another."""
    backbone = tiny_model(architecture)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = kernels(backbone, monkeypatch)
    assert sum(hasattr(module, "weight") for module, _ in found.forwards) == norms
    assert sum(not hasattr(module, "weight") for module, _ in found.forwards) == gates
    ids = torch.randint(3, 250, (2, 9))
    own = backbone(input_ids=ids).logits
    with found():
        torch.testing.assert_close(backbone(input_ids=ids).logits, own, atol=1e-4, rtol=1e-4)
    assert not any("forward" in vars(module) for module in backbone.modules())


@pytest.mark.parametrize(("share", "layers"), [(0.0, 0), (0.34, 2), (1.0, 3)])
def test_gates_that_are_computed_again_give_the_same_gradients_and_keep_less(
    share: float, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token keeps its input of 32 numbers instead of three of 48 (two where compiled); the first layers do so."""
    backbone = tiny_model("qwen3").double()
    plain = kernels(backbone, monkeypatch)
    again = plain.recomputing(share)
    embeds = torch.randn(2, 9, 32, dtype=torch.float64)
    gradients, kept = [], []
    for found in (plain, again):
        leaf = embeds.clone().requires_grad_()
        storages: dict[int, torch.Tensor] = {}
        with found(), torch.autograd.graph.saved_tensors_hooks(partial(_note, storages), lambda tensor: tensor):
            loss = backbone(inputs_embeds=leaf).logits.square().sum()
        # Outside of the block, as in training: the backward pass needs no kernels of it.
        [gradient] = torch.autograd.grad(loss, leaf)
        gradients.append(gradient)
        own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
        kept.append(sum(value.untyped_storage().nbytes() for at, value in storages.items() if at not in own))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert kept[0] - kept[1] == layers * 2 * 9 * 8 * (3 * 48 - 32)
    gated = [module for module, forward in again.forwards if forward.func is fused._gated_again]  # type: ignore[attr-defined]
    assert gated == [layer.mlp for layer in backbone.get_decoder().layers[:layers]]


def _note(storages: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    storages[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def test_the_rotation_is_replaced_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model("qwen3")
    code = sys.modules[type(backbone).__module__]
    before = code.apply_rotary_pos_emb
    calls = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return before(*arguments, **keywords)

    with pytest.raises(KeyError), FusedKernels([], [(code, counted)])():
        backbone(input_ids=torch.tensor([[5, 6]]))
        raise KeyError
    assert len(calls) == 3
    assert code.apply_rotary_pos_emb is before


def test_a_norm_that_computes_something_else_keeps_its_own() -> None:
    norm = tiny_model("llama").get_decoder().norm
    assert equals(norm, lambda hidden: norm(hidden) * 1.001)
    assert not equals(norm, lambda hidden: norm(hidden) * 1.1)
    assert not equals(norm, lambda hidden: hidden.view(-1, 7))
