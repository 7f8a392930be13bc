"""Time and disk against sums made by hand, on a model and a GPU of small numbers."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.backbone.sizes import ModelSizes
from pipeline.cli.cost import Cost, CostModel, answer_seconds, cost_lines, make_costs
from pipeline.cli.plan import AllParams, load_all
from pipeline.evaluate.plan import SuiteSize
from pipeline.optim.flops import read_flops, step_flops
from pipeline.optim.gpus import GPUS, Gpu, gpu_at_hand
from tests.conftest import ROOT

# 168 weights a layer, 376 in all; queries 6 wide, 24 bytes of keys and values a token.
SIZES = ModelSizes(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=3, vocabulary=10, tied=True)
# 40 % of its operations are one a second.
SLOW = Gpu("slow", flops=2.5, bandwidth=500, memory=1e9, source="made up")


def real(**evaluate: Any) -> AllParams:
    params = load_all(ROOT / "params.yaml")
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=evaluate)})


def costs(params: AllParams, gpu: Gpu | None = SLOW, sizes: ModelSizes | None = SIZES) -> dict[str, Cost]:
    """Of 100 rows and a suite of 10 queries and 20 documents of 10 tokens each."""
    evaluation: Any = SimpleNamespace(sizes=lambda _: {"evaluate@s": SuiteSize(1, 10, 20, 300, 200, ())})
    model = CostModel(params, sizes, sizes, sizes and sizes.hidden, 100, gpu)
    return {each.stage: each for each in model.stages(evaluation)}


def test_reading_is_linear_maps_and_attention() -> None:
    assert read_flops(SIZES, 10, 5) == 10 * 2 * (2 * 168 + 4 * 6 * 5)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1160, 86.4 + 5 * 2 * 3.76),  # two rows at once: their operations take longer than the weights
        (1000, 86.4 + 10 * 2 * 872 / 300),  # one: 752 bytes of weights, 24 of each of 5 tokens
        (900, None),
    ],
)
def test_decoding_is_bound_by_operations_or_by_bandwidth(memory: float, expected: float | None) -> None:
    gpu = Gpu("tiny", flops=1000, bandwidth=500, memory=memory, source="made up")
    found = answer_seconds(SIZES, gpu, "bfloat16", rows=10, prompt=4, written=2)
    assert found == (None if expected is None else pytest.approx(expected))


def test_every_stage_by_hand() -> None:
    found = costs(real(seeds=[0, 1]))
    assert list(found) == ["models", "generate", "embed", "train", "evaluate@s"]
    assert found["models"] == Cost("models", None, 2 * 376)
    assert found["generate"].disk == 2 * 100 * (256 + 8 * 500)
    assert found["embed"] == Cost("embed", 51_200 * 2 * (336 + 24 * 512), 100 * 4 * (4 + 2))
    row = step_flops(SIZES, [(512, 512)], compression_tokens=10, width=4)
    assert found["train"].seconds == 128 * row + read_flops(SIZES, 99 * 522, 522)  # 4 steps of 32 rows, and 99 rows
    assert found["train"].parts == {"steps": 128 * row, "closed form": read_flops(SIZES, 99 * 522, 522)}
    # Beside what is trained: four float32 numbers a row of the closed form, 1,024 tokens and a target of every row.
    assert found["train"].disk == 16 * (10 * 4 + 5 * 8) + 99 * 4 * 4 + 100 * (1024 * 4 + 4 * 2)
    # Student and start have readings beside predictions; untrained students of two seeds, teacher and two more do not.
    assert found["evaluate@s"].disk == (2 * 8 + 5 * 4) * 30 * 2


def test_an_alignment_fitted_again_reads_the_rows_of_the_start_once_more() -> None:
    params = real()
    again = params.model_copy(update={"train": params.train.model_copy(update={"refit_alignment": True})})
    before, after = (costs(each)["train"] for each in (params, again))
    assert (after.seconds or 0) - (before.seconds or 0) == pytest.approx(read_flops(SIZES, 99 * 522, 522))
    assert (after.disk or 0) - (before.disk or 0) == 99 * 4 * 4  # the hidden states behind the trained tokens


def test_what_each_system_costs() -> None:
    once, twice = 300 * 2 * (336 + 24 * 10), 600 * 2 * (336 + 24 * 20)
    systems = ["student", "teacher", "untrained", "backbone-mean", "echo", "minilm"]
    found = costs(real(seeds=[0, 1], systems=systems))["evaluate@s"]
    assert found.parts == {
        "student": twice,  # ten new tokens a text, as many as it has of its own
        "teacher": once,
        "untrained": 2 * twice,
        "backbone-mean": once,
        "echo": twice,
        "minilm": None,
    }
    assert found.seconds == 4 * twice + 2 * once


def test_forms_of_one_reading_cost_one_pass() -> None:
    systems = ["untrained", "untrained-standardized", "untrained-decorrelated", "echo", "echo-decorrelated"]
    found = costs(real(systems=systems))["evaluate@s"]
    untrained, standardized, decorrelated, echo, echo_decorrelated = found.parts.values()
    assert untrained == standardized and echo  # the raw student is projected, so its embeddings are its own
    assert decorrelated == echo_decorrelated == 0
    assert found.disk == 3 * 4 * 30 * 2
    without = costs(real(systems=systems, cache_embeddings=False))["evaluate@s"]
    assert without.parts["untrained-decorrelated"] == standardized


def test_hyde_writes_and_its_teacher_reads_what_it_wrote() -> None:
    answers = real().evaluate.answers.model_copy(update={"max_new_tokens": 5})
    found = costs(real(systems=["hyde"], answers=answers))["evaluate@s"]
    written = answer_seconds(SIZES, SLOW, "bfloat16", rows=10, prompt=10, written=5)
    assert written is not None
    reading = read_flops(SIZES, 200 + 10 * 5, 250 / 30)
    assert found.seconds == pytest.approx(written + reading)


def test_what_is_unknown_stays_unknown() -> None:
    without = costs(real(cache_embeddings=False), gpu=None)
    assert [each.seconds for each in without.values()] == [None] * 5
    assert without["evaluate@s"].disk == 0
    assert without["embed"].disk == 2400
    nothing = costs(real(), sizes=None)
    assert {each.seconds for each in nothing.values()} == {None}
    assert nothing["train"].disk is nothing["embed"].disk is nothing["models"].disk is None


def test_the_text_names_assumptions_sums_and_what_is_missing() -> None:
    found = [Cost("embed", 5400, 2.4e9), Cost("evaluate@s", 90, 1e8, {"student": 90.0, "minilm": None})]
    lines = cost_lines(found, GPUS["H100"])
    assert "one H100, computed and not measured (989 TFLOP/s in bfloat16, 3.35 TB/s, 80 GB" in lines[0]
    assert "40% of its operations and 60% of its bandwidth" in lines[0]
    assert [line.split() for line in lines[1:5]] == [
        ["embed", "1.5", "h", "2.4", "GB"],
        ["evaluate@s", "1.5", "min", "0.1", "GB"],
        ["of", "it", "student", "1.5", "min,", "minilm", "-"],
        ["together", "1.5", "h", "2.5", "GB"],
    ]
    without = cost_lines([Cost("embed", None, None)], None)
    assert "--gpu NAME adds times (H200, H100, A100, 4090)" in without[0]
    assert without[1].split() == ["embed", "-", "-"]


def test_the_real_run_is_estimated_with_its_evaluation() -> None:
    found = {each.stage: each for each in make_costs(real(), GPUS["H100"])}
    assert list(found) == ["models", "generate", "embed", "train", "evaluate@mteb-eng-v2", "probe@reasoning"]
    assert all(each.seconds for each in found.values() if each.stage != "models")
    suite = found["evaluate@mteb-eng-v2"]
    assert list(suite.parts) == real().evaluate.systems
    assert max(suite.parts, key=lambda name: suite.parts[name] or 0) == "echo-standardized"
    assert suite.parts["start"] == suite.parts["student"]
    slower = {each.stage: each for each in make_costs(real(), GPUS["A100"])}
    assert slower["embed"].seconds == pytest.approx((found["embed"].seconds or 0) * 989 / 312)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("Tesla T4", None),
    ],
)
def test_the_gpu_at_hand_has_its_own_memory(monkeypatch: pytest.MonkeyPatch, name: str, expected: str | None) -> None:
    assert gpu_at_hand() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=42))
    found = gpu_at_hand()
    assert (found and (found.name, found.memory)) == (expected and (expected, 42.0))
