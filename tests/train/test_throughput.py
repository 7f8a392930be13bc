"""The record of how fast a run went."""

import pytest

from pipeline.backbone.sizes import ModelSizes
from pipeline.optim.flops import step_flops
from pipeline.train.throughput import Throughput

SHAPE = ModelSizes(
    layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=50, tied=True
)  # fmt: skip
LENGTHS = [(3, 5), (10, 2)]


def test_rates_are_of_all_steps_and_processes() -> None:
    work = Throughput(SHAPE, 6, 2, 1)
    work.count(LENGTHS, 0.5)
    work.count(LENGTHS, 1.5)
    facts = work.summary(processes=2)
    assert (facts["seconds_per_step"], facts["tokens_per_second"]) == (1.0, 20.0)
    flops = step_flops(SHAPE, LENGTHS, compression_tokens=2, thought_tokens=1, width=6)
    assert facts["model_tflops"] == pytest.approx(2 * flops / 2.0 / 2 / 1e12, rel=1e-3)


def test_no_step_no_figures_no_shape_no_operations() -> None:
    work = Throughput(None, 6, 2, 0)
    assert work.summary(1) == {}
    work.count(LENGTHS, 1.0)
    assert "model_tflops" not in work.summary(1)
