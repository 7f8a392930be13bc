"""What `python -m pipeline params` says of the memory of train, and that the presets fit the GPUs that they name."""

from typing import Any

import pytest

from pipeline.backbone.lora import LoraParams
from pipeline.cli.plan import load_all
from pipeline.cli.presets import presets
from pipeline.optim.memory import OVERHEAD, LoraSizes, PassTokens, StepSettings, step_memory
from pipeline.train.params import TrainParams
from pipeline.train.plan import memory_line, memory_remarks, pass_tokens, step_settings, train_memory
from tests.conftest import ROOT

SHAPE = presets()["qwen3-4b"].sizes


def changed(**update: Any) -> TrainParams:
    train = load_all(ROOT / "params.yaml").train
    return TrainParams.model_validate(train.model_dump() | {"max_tokens_per_batch": None} | update)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpu(24e9)`: one GPU of that many bytes; `gpu(None)`: none."""

    def set_memory(size: float | None) -> None:
        monkeypatch.setattr("pipeline.train.plan.gpu_bytes", lambda: None if size is None else int(size))

    return set_memory


@pytest.mark.parametrize("name", list(presets()))
def test_a_row_of_every_preset_fits_the_smallest_gpu(name: str, gpu: Any) -> None:
    gpu(24e9)
    assert memory_remarks(changed(micro_batch_size="auto"), "bfloat16", presets()[name].sizes) == []


def test_params_become_settings() -> None:
    passes = {"packed": False, "frozen_prefix": True, "fused_cross_entropy": False, "checkpoint_responses": True}
    train = changed(
        compression_tokens=4, thought_tokens=3, passes=passes, quantize="8bit", lora={"targets": ["attn.q_proj"]}
    )
    assert step_settings(train, "float16") == StepSettings(
        dtype="float16", compression_tokens=4, thought_tokens=3, packed=False, fused_cross_entropy=False,
        checkpoint_responses=True, quantize="8bit", lora=LoraSizes(LoraParams().rank, ("q_proj",)),
    )  # fmt: skip
    every = step_settings(changed(lora={}), "bfloat16").lora
    assert every is not None and len(every.targets) == 7


def test_only_attention_that_is_surely_computed_again_is_counted_so() -> None:
    again = {
        how: step_settings(changed(passes={"attention": how}), "bfloat16") for how in ("auto", "segments", "varlen")
    }
    assert {how: settings.recompute_attention for how, settings in again.items()} == {
        "auto": False, "segments": True, "varlen": False,
    }  # fmt: skip


def test_the_backbone_is_shared_among_processes_only_if_asked() -> None:
    assert step_settings(changed(processes=4), "bfloat16").shards == 1
    assert step_settings(changed(processes=4, shard_backbone=True, micro_batch_size=4), "bfloat16").shards == 4


def test_a_pass_is_rows_of_full_length_or_a_budget() -> None:
    assert pass_tokens(changed(max_query_tokens=100, max_response_tokens=200), 3) == PassTokens(3, 300, 600)
    budget = changed(max_query_tokens=100, max_response_tokens=179, max_tokens_per_batch=1000, thought_tokens=0)
    assert pass_tokens(budget, 1000) == PassTokens(5, 5, 5 * 179)
    few = changed(**budget.model_dump() | {"batch_size": 6, "micro_batch_size": 1, "processes": 3})
    assert pass_tokens(few, 1000).rows == 2


def test_the_line_names_the_parts() -> None:
    train = changed(micro_batch_size=1)
    found = step_memory(SHAPE, PassTokens.full(1, 512, 512), StepSettings(fused_kernels=True, recompute_gates=0.65))
    assert found.logits and not found.workspace
    assert memory_line(train, "bfloat16", SHAPE) == (
        "1 row of full length at a time: at most 9.9 GB (weights 8.0, activations 1.2, logits 0.5, optimizer 0.2)"
    )
    assert memory_line(changed(max_tokens_per_batch=3000), "bfloat16", SHAPE).startswith("3,000 tokens at a time")


def test_auto_is_what_fits_on_the_gpu_at_hand_and_a_whole_step_without_one(gpu: Any) -> None:
    train = changed(micro_batch_size="auto", batch_size=32)
    for size, rows in ((None, 32), (500e9, 32), (24e9, None)):
        gpu(size)
        line = memory_line(train, "bfloat16", SHAPE)
        assert line.startswith("auto, ")
        shown = int(line.split(" ")[1])
        assert rows in (shown, None)
        assert f"at most {train_memory(SHAPE, 'bfloat16', train, shown).total / 1e9:.1f} GB" in line
    totals = [train_memory(SHAPE, "bfloat16", train, count).total + OVERHEAD for count in (shown, shown + 1)]
    assert totals[0] <= 24e9 < totals[1]


def test_no_remark_without_a_gpu_or_with_one_that_suffices(gpu: Any) -> None:
    for size in (None, 80e9):
        gpu(size)
        assert memory_remarks(changed(micro_batch_size=4), "bfloat16", SHAPE) == []


@pytest.mark.parametrize("budget", [None, 16_000])
def test_a_remark_says_what_fits(gpu: Any, budget: int | None) -> None:
    gpu(24e9)
    train = changed(micro_batch_size=16, max_tokens_per_batch=budget)
    [remark] = memory_remarks(train, "bfloat16", SHAPE)
    knob = "max_tokens_per_batch" if budget else "micro_batch_size"
    assert "the GPU has 24.0 GB" in remark
    assert "with train.passes.checkpoint_responses: " in remark and "with train.quantize 4bit: " in remark
    largest = int(remark.split(f"train.{knob}: ")[1].split(", with")[0].replace(",", ""))
    totals = [train_memory(SHAPE, "bfloat16", train, count).total + OVERHEAD for count in (largest, largest + 1)]
    assert totals[0] <= 24e9 < totals[1]


def test_a_gpu_that_is_too_small_for_anything(gpu: Any) -> None:
    gpu(4e9)
    train = changed(micro_batch_size=1, quantize="4bit", passes={"checkpoint_responses": True})
    [remark] = memory_remarks(train, "bfloat16", SHAPE)
    assert remark.endswith("The largest that fits, train.micro_batch_size: none")
