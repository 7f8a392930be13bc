"""Models of full size walk on the GPU that does nothing: a step that mixes devices fails there as on a GPU.

Every model trains whole, with passes that are not compared before, which is quicker; one with two layers compares them.
Of the other modes each meets two architectures and each architecture two modes, cut to a few layers (Gemma to a period
of its windows): layers of one kind are alike.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fake_gpu.device import compiler
from bench.fake_gpu.models import NAMES
from tests.conftest import ROOT, SMALL_TEACHER

pytestmark = [
    pytest.mark.fake_gpu,
    pytest.mark.slow,  # the device is compiled once, and importing transformers takes seconds
    pytest.mark.skipif(compiler() is None, reason="the fake GPU needs a C++ compiler"),
]


def walk(*options: str) -> list[dict[str, Any]]:
    """What each way of the modes prints."""
    command = [sys.executable, str(Path("bench") / "gpu_walk.py"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


MIXED = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from bench.fake_gpu import device
from bench.gpu_walk import LIBRARY
device.load(device.build(LIBRARY))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.fake_gpu.meter import Meter
meter = Meter()
with FakeTensorMode(), meter:
    host, gpu = torch.ones(3, 4), torch.ones(3, 4, device="cuda:0")
    meter.reset()
    gpu + host.to("cuda:0")
    print(len(meter.kernels), dict(meter.h2d), dict(meter.d2h), meter.live, float((gpu * gpu).sum()), dict(meter.d2h))
    gpu + host
"""


def test_tensors_of_two_devices_do_not_add() -> None:
    done = subprocess.run([sys.executable, "-c", MIXED], cwd=ROOT, capture_output=True, text=True, check=False)
    # A copy and a sum are two kernels; 48 bytes are alive. The host reads one number.
    assert done.stdout == "2 {'': 1} {} 48 0.0001 {'': 1}\n", done.stderr
    assert done.returncode == 1 and "at least two devices, cuda:0 and cpu" in done.stderr


def in_estimate(found: dict[str, Any]) -> bool:
    return found["peak_gb"] == pytest.approx(found["estimate_gb"], rel=0.05)


def test_a_training_step_as_shipped() -> None:
    (found,) = walk("--model", "qwen3-4b", "--rows", "16", "--uncompared")
    assert in_estimate(found), found
    assert found["kernels"] <= 6000 and found["h2d"] <= 6 and found["d2h"] <= 1, found
    assert found["peak_gb"] <= 28 and found["mfu_ceiling_h100"] >= 0.45, found


def test_one_query_pass_for_several_micro_batches_launches_less() -> None:
    rows = (
        "--model",
        "qwen3-0.6b",
        "--uncompared",
        "--layers",
        "12",
        "--rows",
        "8",
        "--query",
        "80",
        "--micro-batches",
        "4",
    )
    (together,), (apart,) = walk(*rows), walk(*rows, "--queries-apart")
    assert together["kernels"] < 0.75 * apart["kernels"]


def test_every_model_trains() -> None:
    others = [name for name in NAMES if name != "qwen3-4b"]
    found = walk("--uncompared", "--model", *others)
    assert [line["model"] for line in found] == others
    for line in found:
        assert in_estimate(line), line
        assert line["h2d"] <= 6 and line["d2h"] <= 1, line


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "qwen3-0.6b", "--checkpoint-responses"),
        ("--model", "llama-3.2-1b", "--lora", "8"),
        ("--model", "qwen3-0.6b", "--attention", "segments"),
        ("--model", "gemma3-1b", "--recompute-gates", "0"),
    ],
)
def test_every_way_of_training_walks(options: tuple[str, ...]) -> None:
    (found,) = walk("--uncompared", *options)
    assert in_estimate(found), found


@pytest.mark.parametrize(
    ("model", "layers", "modes"),
    [
        ("gemma3-1b", 6, ("read", "embed")),
        ("qwen2.5-7b", 2, ("read", "head")),
        ("llama-3.2-1b", 2, ("embed", "teach")),
        ("qwen3-8b", 2, ("train", "head", "teach")),
    ],
)
def test_every_use_stays_on_the_device(model: str, layers: int, modes: tuple[str, ...]) -> None:
    found = walk("--model", model, "--layers", str(layers), "--mode", *modes)
    expected: dict[str, set[str | None]] = {
        "train": {None},
        "read": {"encode, instruction", "encode", "soft prompts", "hidden states"},
        "embed": {"backbone", "echo", "both directions", *(["sentence encoder"] if SMALL_TEACHER.is_dir() else [])},
        "teach": {"mntp", "simcse"},
        "head": {"lens", "decode", "generate, greedy", "generate, sampled"},
    }
    for mode in modes:
        assert {line.get("way") for line in found if line["mode"] == mode} == expected[mode]
    for line in found:
        assert line["kernels"] > 0
        if line["mode"] == "read":
            assert line["h2d"] <= 3 and line["d2h"] == 1, line
        if line["mode"] == "teach":
            assert line["peak_gb"] == pytest.approx(line["estimate_gb"], rel=0.1), line
