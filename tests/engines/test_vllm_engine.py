"""The vLLM engine: its messages without vLLM's processes, and (marker models) the real thing beside transformers."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone import BackboneParams, PromptFormatter, load_tokenizer
from pipeline.engines import build_engine
from pipeline.engines.base import Completion, Prompt, Sampling
from pipeline.engines.vllm_engine import VllmEngine, _automatic, _check_options
from pipeline.errors import EngineError
from tests.conftest import ROOT

QUESTIONS = [
    "What is the capital of France?", "How do I boil an egg?", "What is 12 times 7?", "Who wrote Hamlet?",
    "Write a Python function that reverses a string.", "Is 'great phone' a positive review?", "Name three planets.",
    "Why is the sky blue?", "How can I sleep better?", "Translate 'good morning' into Spanish.", "What is DNA?",
    "Explain rain to a child.",
]  # fmt: skip
SAMPLING = Sampling(max_new_tokens=16)


@pytest.fixture
def environment() -> Iterator[None]:
    """vLLM writes into os.environ; put it back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def build(name: Any, small_lm: Path) -> Any:
    backbone = BackboneParams(name=str(small_lm))
    options = {"kv_cache_memory_bytes": 2**28, "max_num_seqs": 8} if name == "vllm" else {}
    return build_engine(name, backbone, dtype="float32", max_prompt_tokens=80, max_new_tokens=16, options=options)


def answers(engine: Any, prompts: list[Prompt]) -> dict[str, Completion]:
    found = list(engine.generate(iter(prompts), SAMPLING))
    assert len(found) == len({completion.id for completion in found})
    return {completion.id: completion for completion in found}


def test_missing_vllm_names_the_extras_and_the_fallback(monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = r"(?s)vllm cannot be imported.*\[gpu\].*\[cpu\].*generate\.engine: transformers"
    with pytest.raises(EngineError, match=message):
        VllmEngine(BackboneParams(name="org/model"), max_model_len=8, options={})


def test_unknown_option_suggests_the_known_one() -> None:
    arguments = make_dataclass("EngineArgs", [("max_num_seqs", int)])
    with pytest.raises(EngineError, match=r"no 'max_nun_seqs' \(did you mean 'max_num_seqs'\?\)"):
        _check_options(arguments, {"max_nun_seqs": 4})


def test_the_stage_sets_openmp_before_torch_is_imported() -> None:
    code = (
        "import os, sys; import pipeline.stages.generate; from pipeline.engines import prepare_environment\n"
        "prepare_environment('vllm')\n"
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_NUM_THREADS": "7"}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert output.stdout.split() == [b"False", b"PASSIVE", b"7"]


def test_an_option_that_other_params_decide() -> None:
    with pytest.raises(EngineError, match=r"'dtype' is not an option here, it follows from generate\.dtype"):
        _check_options(make_dataclass("EngineArgs", ["dtype"]), {"dtype": "float32"})


def test_each_automatic_choice_is_said_unless_an_option_makes_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = _automatic(False, {"max_num_seqs": 3})
    assert chosen == {"enable_prefix_caching": True, "enforce_eager": True, "kv_cache_memory_bytes": 2**30}
    assert "enforce_eager = True (compiling takes minutes on a CPU)" in caplog.text
    assert "max_num_seqs" not in caplog.text


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_model_beside_transformers(small_lm: Path, environment: None) -> None:
    pytest.importorskip("vllm")
    formatter = PromptFormatter(load_tokenizer(BackboneParams(name=str(small_lm))), "chat", 80)
    good = [Prompt(f"q{i}", formatter(text).token_ids, i) for i, text in enumerate(QUESTIONS)]
    bad = [Prompt("long", [100] * 90, 0), Prompt("stranger", [1, 10**6], 0)]
    with closing(build("vllm", small_lm)) as engine:
        found = answers(engine, [*bad, *good])
        again = answers(engine, list(reversed(good)))
        warm = Sampling(16, temperature=1.0)
        sampled = [{c.id: c.text for c in engine.generate(order, warm)} for order in (good, good[::-1])]
    with closing(build("transformers", small_lm)) as engine:
        expected = answers(engine, good)
    assert "prompt too long: 90 tokens + 16 new ones exceed 96" in str(found["long"].error)
    assert found["stranger"].finish_reason == "error"
    assert len(again) == len(good) == len(found) - len(bad)
    same = [row for row, answer in expected.items() if found[row] == answer]
    assert len(same) >= 9, [(found[row].text, answer.text) for row, answer in expected.items()]
    assert sum(sampled[0][row] == sampled[1][row] for row in expected) >= 9
    assert "Paris" in found["q0"].text
