"""The probe of bidirectional attention tells a causal model from one that is not, alone and padded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import TeacherError
from pipeline.teachers.bidirectional import check_bidirectional, make_bidirectional
from tests.teachers.tiny_llm2vec import tiny_lm

CASES = [(a, i) for a in ("llama", "qwen2", "qwen3", "gemma3") for i in ("sdpa", "eager")]


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
    from pipeline.backbone import BackboneParams, load_backbone

    body = load_backbone(BackboneParams(name=str(small_lm), dtype="bfloat16")).get_decoder()
    with pytest.raises(TeacherError, match="is causal in a text alone"):
        check_bidirectional(body, "SmolLM2")
    make_bidirectional(body)
    check_bidirectional(body, "SmolLM2")
    check_bidirectional(body.float(), "SmolLM2")
