"""The vLLM engine: its messages without vLLM's processes, and (marker models) the real thing beside transformers."""

import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.registry import build_engine
from pipeline.generate.engines.vllm import CPU_KV_CACHE_VARIABLE, VllmEngine, _automatic, check_arguments
from pipeline.generate.engines.vllm_defaults import Choice
from pipeline.generate.engines.vllm_environment import check_batch_invariance, nvml_names, set_environment
from tests.conftest import ROOT
from tests.generate.engines.conftest import GREEDY, SIZES, agree


def test_missing_vllm_names_the_extras_and_the_fallback(monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = r"(?s)^engine: vllm cannot be imported.*\[gpu\].*\[cpu\].*transformers"
    with pytest.raises(EngineError, match=message):
        VllmEngine.load(EngineSetup(BackboneParams(name="org/model"), 8))


def test_unknown_option_suggests_the_known_one() -> None:
    with pytest.raises(EngineError, match=r"^options\.max_nun_seqs: .*\(did you mean 'max_num_seqs'\?\)"):
        check_arguments({"max_nun_seqs": 4}, {"max_num_seqs"})


@pytest.mark.parametrize("wrong", ["64", None, 0])
def test_a_wrong_number_of_sequences_is_refused(wrong: object) -> None:
    with pytest.raises(EngineError, match=rf"^options\.max_num_seqs: {wrong!r}, "):
        check_arguments({"max_num_seqs": wrong}, {"max_num_seqs"})


def test_random_weights_are_no_matter_of_speed() -> None:
    assert "load_format" not in VllmEngine.SPEED_OPTIONS


def test_the_stage_sets_openmp_before_torch_is_imported() -> None:
    code = (
        "import os, sys; import pipeline.generate; from pipeline.generate.engines.registry import prepare_environment\n"
        "import psutil; psutil.cpu_percent = lambda interval: 0.0\n"
        "prepare_environment('vllm')\n"
        "names = 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS', 'PYTORCH_NVML_BASED_CUDA_CHECK'\n"
        "print('torch' in sys.modules, *(os.environ[name] for name in names))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment |= {"OMP_NUM_THREADS": "7"}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert output.stdout.split() == [b"False", b"5000", b"7", b"1"]


class TwoKinds:
    """NVML on a machine whose first slot has a small GPU and whose second has the fast one, CUDA's number 0."""

    kinds = ("small", "fast")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.kinds)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.kinds[handle]


@pytest.mark.parametrize(
    ("kinds", "order", "names", "expected"),
    [
        (("small", "fast"), None, ["0"], ["0", "1"]),  # which of them CUDA calls 0 is not known here
        (("small", "fast"), "PCI_BUS_ID", ["1"], ["1"]),
        (("fast", "fast"), None, ["1"], ["1"]),
        (("small", "fast"), None, ["GPU-ab"], ["GPU-ab"]),
    ],
)
def test_a_number_of_cuda_is_no_number_of_nvml_among_gpus_of_several_kinds(
    kinds: tuple[str, ...], order: str | None, names: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    nvml = TwoKinds()
    monkeypatch.setattr(nvml, "kinds", kinds, raising=False)
    assert nvml_names(nvml, names) == expected


def test_each_automatic_choice_is_logged_unless_an_option_makes_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CPU_KV_CACHE_VARIABLE, raising=False)
    choices = {"max_num_seqs": Choice(5, "why not"), "kv_cache_memory_bytes": Choice(7, "enough")}
    with caplog.at_level(logging.INFO):
        chosen = _automatic(choices, 96, {"max_num_seqs": 3})
    assert chosen == {"enable_prefix_caching": True, "kv_cache_memory_bytes": 7}
    assert "kv_cache_memory_bytes = 7 (enough)" in caplog.text
    assert "max_model_len = 96 (a prompt and its answer)" in caplog.text
    assert "max_num_seqs" not in caplog.text


def test_vllms_own_variable_decides_the_cache(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_KV_CACHE_VARIABLE, "4")
    with caplog.at_level(logging.INFO):
        assert "kv_cache_memory_bytes" not in _automatic({"kv_cache_memory_bytes": Choice(7, "enough")}, 96, {})
    assert "VLLM_CPU_KVCACHE_SPACE=4 decides the KV cache" in caplog.text


@pytest.mark.parametrize(("name", "argument"), [("tensor_parallel_size", "tensor_parallel"), ("dtype", "dtype")])
def test_an_option_that_other_arguments_decide(name: str, argument: str) -> None:
    with pytest.raises(EngineError, match=rf"^options\.{name}: .*follows from {argument}"):
        check_arguments({name: 2}, {name})


def test_batch_invariance_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match=r"^batch_invariant: .*need a GPU, .*dtype to float32"):
        check_batch_invariance()


def test_the_environment_is_set_and_logged(
    environment: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    with caplog.at_level(logging.INFO):
        set_environment(on_gpu=False, batch_invariant=True)
    assert os.environ["VLLM_BATCH_INVARIANT"] == "1"
    assert "threads: OMP_NUM_THREADS=3" in caplog.text
    assert "OMP_PROC_BIND=true" in caplog.text


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_model_beside_transformers(
    small_lm: Path, questions: list[Prompt], by_transformers: dict[str, Completion], environment: None
) -> None:
    pytest.importorskip("vllm")
    bad = [Prompt("long", [100] * 90, 0), Prompt("stranger", [1, 10**6], 0)]
    options = {"kv_cache_memory_bytes": 2**28, "max_num_seqs": 8}
    with closing(build_engine("vllm", BackboneParams(name=str(small_lm)), **SIZES, options=options)) as engine:
        found = list(engine.generate(iter([*bad, *questions]), GREEDY))
        again = list(engine.generate(reversed(questions), GREEDY))
        warm = Sampling(16, temperature=1.0)
        sampled = [{c.id: c for c in engine.generate(order, warm)} for order in (questions, questions[::-1])]
    rows = {answer.id: answer for answer in found}
    assert len(found) == len(rows) == len(questions) + len(bad)
    assert len(again) == len({answer.id for answer in again}) == len(questions)
    assert "prompt too long: 90 tokens + 16 new ones exceed 96" in str(rows["long"].error)
    assert rows["stranger"].finish_reason == "error"
    assert agree(rows, by_transformers)
    assert agree(*sampled)
    assert "Paris" in rows["q0"].text
