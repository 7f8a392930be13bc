"""Full-size models walk a training step on the GPU that does nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fake_gpu.device import compiler
from bench.fake_gpu.models import NAMES
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.fake_gpu,
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="the fake GPU needs a C++ compiler"),
]


def walk(*options: str) -> dict[str, Any]:
    command = [sys.executable, str(Path("bench") / "gpu_walk.py"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", NAMES)
def test_a_training_step_stays_on_the_device_and_in_the_estimate(model: str) -> None:
    found = walk("--model", model, "--rows", "16")
    assert found["peak_gb"] == pytest.approx(found["estimate_gb"], rel=0.05)
    assert found["kernels"] > 0


def test_a_step_of_qwen3_4b_as_shipped_stays_within_what_was_promised() -> None:
    found = walk("--model", "qwen3-4b", "--rows", "16")
    assert found["kernels"] <= 6000 and found["h2d"] <= 6 and found["d2h"] <= 1
    assert found["peak_gb"] <= 28 and found["mfu_ceiling_h100"] >= 0.45


def test_one_query_pass_for_several_micro_batches_launches_less() -> None:
    rows = ("--model", "qwen3-0.6b", "--rows", "8", "--query", "80", "--micro-batches", "4")
    together, apart = walk(*rows), walk(*rows, "--queries-apart")
    assert together["kernels"] < 0.75 * apart["kernels"]


@pytest.mark.parametrize(
    "options", [("--checkpoint-responses",), ("--lora", "8"), ("--attention", "segments"), ("--recompute-gates", "0")]
)
def test_every_way_of_training_walks(options: tuple[str, ...]) -> None:
    found = walk("--model", "qwen3-0.6b", "--rows", "16", *options)
    assert found["peak_gb"] == pytest.approx(found["estimate_gb"], rel=0.05)
