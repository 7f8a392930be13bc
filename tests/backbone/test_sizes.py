"""Sizes as configs state them, against the models that are built from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.sizes import sizes_from_config
from tests.conftest import tiny_model

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "vocab_size": 260,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "norms", "head_norms"), [("llama", 2, False), ("qwen3", 2, True), ("gemma3", 4, True)]
)
def test_the_sizes_of_real_architectures(architecture: str, norms: int, head_norms: bool) -> None:
    model = tiny_model(architecture)
    shape = sizes_from_config(model.config.to_dict())
    assert shape is not None
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (3, 4, 2, 8)
    weights = [parameter.numel() for parameter in model.parameters() if parameter.ndim == 2]
    assert shape.parameters() == sum(weights)
    modules = [name for name, _ in model.named_modules() if name.startswith("model.layers.0.") and "norm" in name]
    assert (shape.norms, shape.head_norms) == (norms, head_norms)
    assert len(modules) == norms + 2 * head_norms


def test_the_biases_of_qwen2() -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = sizes_from_config(config.to_dict())
    assert shape is not None and shape.bias
    counted = {name: parameter.numel() for name, parameter in model.named_parameters() if "norm" not in name}
    assert shape.parameters() == sum(counted.values())


def test_what_a_config_may_leave_out_or_nest() -> None:
    shape = sizes_from_config({"text_config": CONFIG})
    assert shape is not None
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 8, True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        CONFIG | {"num_experts": 8},
        CONFIG | {"num_local_experts": 8},
        CONFIG | {"intermediate_size": [48, 48, 64]},  # Gemma 3n: one a layer
        CONFIG | {"intermediate_size": None},
        CONFIG | {"num_attention_heads": None},
        {"text_config": None},
    ],
)
def test_what_has_no_such_sizes(config: dict[str, Any]) -> None:
    assert sizes_from_config(config) is None


@pytest.mark.models
def test_a_real_config(small_lm: Path) -> None:
    shape = sizes_from_config(json.loads((small_lm / "config.json").read_text()))
    assert shape is not None
    assert shape.parameters() == pytest.approx(134.5e6, rel=0.001)
