"""Heads that do more than project, and architectures beside those of `test_switches`: fused, and equal to the plain."""

import logging
from typing import Any

import pytest
import torch

from pipeline.backbone.output_head import LogitTransform, logit_transform
from pipeline.core.errors import BackboneError
from pipeline.encoder.passes.plain import plain_passes
from pipeline.encoder.passes.select import make_passes
from tests.conftest import tiny_model
from tests.encoder.passes.exact_models import configured, difference, loss_and_gradients, sharpened

QUERIES = [[5, 6, 7], list(range(10, 50)), [9]]
RESPONSES = [[4, 5, 6, 2], [7, 2], list(range(60, 100))]
HEADS: dict[str, tuple[str, dict[str, Any], LogitTransform]] = {
    "soft-capped": ("gemma3_text", {"final_logit_softcapping": 0.8, "sliding_window": 16}, LogitTransform(softcap=0.8)),
    "divided": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, LogitTransform(scale=0.25)),
    "multiplied": ("cohere", {"logit_scale": 0.5}, LogitTransform(scale=0.5)),
    "with a bias": ("phi", {"partial_rotary_factor": 0.5}, LogitTransform()),
}


@pytest.mark.parametrize(("architecture", "settings", "shape"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("packed", [True, False])
def test_heads_that_do_more_are_fused_and_exact(
    architecture: str, settings: dict[str, Any], shape: LogitTransform, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = sharpened(configured(architecture, **settings)).double()
    assert logit_transform(model) == shape
    passes = make_passes(model, packed=packed)
    assert not caplog.records
    found = loss_and_gradients(model, passes, QUERIES, RESPONSES)
    expected = loss_and_gradients(model, plain_passes(model), QUERIES, RESPONSES)
    assert max(difference(found, expected).values()) < 1e-9


@pytest.mark.parametrize("checkpoint_responses", [False, True])
def test_soft_capped_attention_is_packed(checkpoint_responses: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2, in float32: the eager attention that it needs as a reference computes its softmax in no more."""
    settings = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "sliding_window": 16}
    model = sharpened(configured("gemma2", **settings, query_pre_attn_scalar=8))
    passes = make_passes(model, checkpoint_responses=checkpoint_responses)
    assert not passes.padded
    assert "cannot" not in caplog.text
    found = loss_and_gradients(model, passes, QUERIES, RESPONSES)
    expected = loss_and_gradients(model, plain_passes(model), QUERIES, RESPONSES)
    assert max(difference(found, expected).values()) < 1e-4


def test_a_trained_head_is_not_fused() -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_()
    with pytest.raises(BackboneError, match="the head of LlamaForCausalLM is trained"):
        logit_transform(model)


def test_a_head_of_another_kind_is_not_fused() -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(BackboneError, match="is a Sequential, not a plain projection"):
        logit_transform(model)
