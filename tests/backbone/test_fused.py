"""Fused kernels equal the modules that they replace, and are refused where they differ."""

import sys
from collections.abc import Iterator
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
