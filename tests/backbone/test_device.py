"""Which device is chosen, and what is said where a CUDA build of torch finds no GPU."""

from pathlib import Path

import pytest
import torch

from pipeline.backbone.device import best_device, check_device, cuda_problem, exact_dtype
from pipeline.core.errors import BackboneError


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch as its CUDA 13 build, without a usable GPU and without a driver."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("PIPELINE_DEVICE", raising=False)
    return monkeypatch


def driver(folder: Path, prints: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that prints this."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' {prints}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_a_cpu_build_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_problem() is None
    assert best_device() == "cpu"


def test_a_usable_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_problem() is None
    assert best_device() == "cuda"


@pytest.mark.parametrize("name", ["gpu", "CPU", " cpu"])
def test_a_variable_that_names_no_device_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", name)
    with pytest.raises(BackboneError, match=f"^PIPELINE_DEVICE is '{name}', which is no device: set cuda or cpu$"):
        best_device()


def test_a_variable_that_names_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "cuda:1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackboneError, match=r"^PIPELINE_DEVICE is 'cuda:1', and no GPU is usable: .* without CUDA$"):
        best_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda:1"


def test_a_cuda_build_without_a_driver_stops(cuda_build: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match=r"CUDA 13\.0.*580.*no NVIDIA driver.*PIPELINE_DEVICE=cpu"):
        best_device()


def test_an_old_driver_is_named(cuda_build: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(tmp_path, "570.86.15", cuda_build)
    problem = cuda_problem()
    assert problem is not None
    assert "580" in problem
    assert "570.86.15: update" in problem


def test_hidden_gpus_are_named(cuda_build: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(tmp_path, "580.95.05", cuda_build)
    cuda_build.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES is '7'" in str(cuda_problem())


def test_the_cpu_may_be_chosen_on_purpose(cuda_build: pytest.MonkeyPatch) -> None:
    cuda_build.setenv("PIPELINE_DEVICE", "cpu")
    assert best_device() == "cpu"


def test_apples_gpu_sums_in_float32() -> None:
    assert exact_dtype(torch.device("mps")) == torch.float32
    assert exact_dtype(torch.device("cpu")) == torch.float64


def test_an_empty_message_is_still_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("torch.empty", refuse)
    with pytest.raises(BackboneError, match="^device: mps cannot be used here: RuntimeError$"):
        check_device("mps")
