"""The cost table adds up what the records say, and says nothing that they do not."""

from typing import Any

from pipeline.report.cost import Machine, machines, stage_run, total

TWO = {"gpus": ["H100", "H100"], "cores": 16, "memory_gib": 128.0, "python": "3.11.7", "git_revision": "abc",
       "versions": {"torch": "2.13.0"}}  # fmt: skip
GENERATE: dict[str, Any] = {
    "seconds": 1800.0, "started": "2026-01-02T03:04:05Z", "peak_memory_mib": 4000, "environment": TWO,
    "prompt_tokens": 1000, "response_tokens": 3000, "computed_rows": 1200, "reused_rows": 300, "rows": 1500,
    "gpu_memory_mib": {"cuda:0": 70000, "cuda:1": 71000},
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "seconds": 3600.0, "environment": TWO, "processes": 1, "rows": 900,
    "training": {"tokens": 5000, "tokens_per_second": 2.0, "peak_gpu_memory_mib": 40000},
}  # fmt: skip


def test_gpu_hours_are_time_on_each_gpu_that_was_held() -> None:
    generate, train = stage_run("generate", GENERATE), stage_run("train", TRAIN)
    assert (generate.gpus, generate.gpu_hours) == (2, 1.0)
    assert (train.gpus, train.gpu_hours) == (1, 1.0)
    assert stage_run("embed", {"seconds": 9.0, "environment": {"gpus": []}}).gpu_hours == 0


def test_tokens_rows_and_memory_are_the_records() -> None:
    run = stage_run("generate", GENERATE)
    assert (run.tokens_in, run.tokens_out, run.gpu_memory_mib) == (1000, 3000, 71000)
    assert run.work == "1,200 rows, 300 kept from before"
    train = stage_run("train", TRAIN)
    assert (train.tokens_in, train.tokens_out, train.gpu_memory_mib, train.work) == (5000, None, 40000, "900 rows")
    assert stage_run("embed", {"computed_tokens": 0}).tokens_in == 0
    assert stage_run("evaluate x", {"tasks": 3}).work == "3 tasks"
    assert stage_run("collect", {"counts": {"all": {"train": 8, "heldout": 2, "read": 99}}}).work == "10 rows"


def test_totals_sum_what_is_known() -> None:
    runs = [stage_run("generate", GENERATE), stage_run("train", TRAIN), stage_run("probe x", {"seconds": 1.0})]
    names = ("seconds", "gpu_hours", "tokens_in", "tokens_out")
    assert [total(runs, name) for name in names] == [5401.0, 2.0, 6000, 3000]
    assert [total([stage_run("probe x", {})], name) for name in names] == [0.0, 0.0, None, None]


def test_equal_machines_are_named_once() -> None:
    found = machines({"generate": GENERATE, "train": TRAIN, "embed": {}})
    assert found == [
        Machine(["generate", "train"], "2 x H100, 16 cores, 128.0 GiB", "3.11.7", "abc", "torch 2.13.0"),
        Machine(["embed"], "", "", "", ""),
    ]
