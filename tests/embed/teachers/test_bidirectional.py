"""The probe of bidirectional attention tells a causal model from one that is not, alone and padded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
from tests.conftest import SMALL_CONFIG
from tests.embed.teachers.tiny_llm2vec import tiny_lm

CASES = [(a, i) for a in ("llama", "qwen2", "qwen3", "gemma3", "phi3", "olmo2") for i in ("sdpa", "eager")]


def body_of(architecture: str, implementation: str) -> Any:
    model = tiny_lm(architecture)
    model.set_attn_implementation(implementation)
    return model.get_decoder()


@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_a_causal_model_is_refused_and_a_bidirectional_one_passes(architecture: str, implementation: str) -> None:
    body = body_of(architecture, implementation)
    with pytest.raises(TeacherError, match="teacher tiny is causal in a text alone"):
        check_bidirectional(body, "tiny")
    make_bidirectional(body)
    check_bidirectional(body, "tiny")
    assert body.config.use_cache is False


def lfm2(types: list[str]) -> Any:
    """Short causal convolutions, with attention between them."""
    config = Lfm2Config(**{**SMALL_CONFIG, "num_hidden_layers": len(types), "pad_token_id": 0}, layer_types=types)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).get_decoder()


@pytest.mark.parametrize(("first", "types"), [(0, ["conv", "full_attention", "conv"]), (1, ["full_attention", "conv"])])
def test_a_hybrid_whose_other_layers_stay_causal_is_refused(first: int, types: list[str]) -> None:
    body = lfm2(types)
    make_bidirectional(body)
    causal = types.count("conv")
    said = rf"{causal} of {len(types)} layers \(Lfm2DecoderLayer, the first is layer {first}\) see nothing .* a hybrid"
    with pytest.raises(TeacherError, match=said):
        check_bidirectional(body, "tiny")


def test_one_causal_layer_among_others_is_refused() -> None:
    body = body_of("qwen3", "eager")
    make_bidirectional(body)
    layer = body.layers[1]
    forward = layer.forward

    def causal(hidden_states: Any, attention_mask: Any = None, **rest: Any) -> Any:
        length = hidden_states.shape[1]
        barred = torch.full((length, length), float("-inf")).triu(1)
        return forward(hidden_states, attention_mask=barred + (0 if attention_mask is None else attention_mask), **rest)

    layer.forward = causal
    with pytest.raises(TeacherError, match=r"1 of 3 layers \(Qwen3DecoderLayer, the first is layer 1\)"):
        check_bidirectional(body, "tiny")


def test_switching_the_layers_alone_is_found_out() -> None:
    body = body_of("llama", "sdpa")
    for module in body.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(TeacherError, match="is causal in a left-padded batch"):
        check_bidirectional(body, "tiny")


def test_padding_that_is_attended_to_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of("llama", "eager")
    make_bidirectional(body)
    forward = type(body).forward

    def blind(self: Any, **inputs: Any) -> Any:
        return forward(self, **inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})

    monkeypatch.setattr(type(body), "forward", blind)
    with pytest.raises(TeacherError, match=r"left padding moves an embedding by 0\.\d+, the limit is 0.001"):
        check_bidirectional(body, "tiny")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    body = body_of("qwen3", "sdpa").to(dtype)
    make_bidirectional(body)
    check_bidirectional(body, "tiny")


@pytest.mark.models
def test_a_real_model_passes_in_half_precision_too(small_lm: Path) -> None:
    from pipeline.backbone.loading import BackboneParams, load_backbone

    body = load_backbone(BackboneParams(name=str(small_lm), dtype="bfloat16")).get_decoder()
    with pytest.raises(TeacherError, match="is causal in a text alone"):
        check_bidirectional(body, "SmolLM2")
    make_bidirectional(body)
    check_bidirectional(body, "SmolLM2")
    check_bidirectional(body.float(), "SmolLM2")
