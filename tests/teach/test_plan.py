"""The estimate of a step against the bytes that autograd keeps, and the texts of a pass that fit."""

from typing import Any

import pytest

from pipeline.backbone.sizes import sizes_from_config
from pipeline.cli.presets import presets
from pipeline.teach.params import TeachParams
from pipeline.teach.plan import fitting_rows, phase_memory
from tests.optim.test_memory import kept_bytes
from tests.teach.helpers import adapted
from tests.teach.test_simcse import objective

TEXTS = [letter * 60 for letter in "abcd"]


def sizes() -> Any:
    found = sizes_from_config(adapted()[2].config.to_dict())
    assert found is not None
    return found


def teach(micro: int) -> TeachParams:
    phase = {"batch_size": 8, "micro_batch_size": micro, "max_tokens": 60, "lora": {"rank": 8, "dropout": 0.1}}
    return TeachParams.model_validate({"dtype": "float32", "mntp": phase, "simcse": phase})


def test_the_estimate_bounds_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.teach.plan.MASK", 4)  # as on a CPU
    made, _ = objective(TEXTS, micro=4, dropout=0.1)
    kept = kept_bytes(made.body, lambda: made._view([0, 1, 2, 3], 0, 0, 0))
    params = teach(4)
    assert kept <= phase_memory(params, params.simcse, sizes()).activations <= 1.5 * kept


def test_a_batch_of_one_pass_keeps_both_views() -> None:
    parts, whole = teach(4), teach(8)
    both, one = (phase_memory(params, params.simcse, sizes()).activations for params in (whole, parts))
    assert both == 4 * one
    both, one = (phase_memory(params, params.mntp, sizes()).activations for params in (whole, parts))
    assert both == 2 * one


@pytest.mark.parametrize("name", presets())
def test_the_most_texts_that_fit(name: str) -> None:
    """In powers of two, and never more than a batch."""
    params, sizes = TeachParams(), presets()[name].sizes
    for phase in (params.mntp, params.simcse):
        small, large = (fitting_rows(params, phase, sizes, size * 1e9) for size in (24, 80))
        assert 1 <= small <= large <= phase.batch_size
        assert large & (large - 1) == 0
        assert phase_memory(params, phase.model_copy(update={"micro_batch_size": large}), sizes).total < 78.5e9
        if large < phase.batch_size:
            more = phase.model_copy(update={"micro_batch_size": 2 * large})
            assert phase_memory(params, more, sizes).total > 78.5e9
