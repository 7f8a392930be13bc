"""Every engine is reached by name, with the arguments and options that it can take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines.registry import ENGINES, build_engine
from tests.conftest import ROOT


def build(name: str, folder: Path, **wanted: Any) -> Any:
    sizes = {"dtype": "float32", "max_prompt_tokens": 64, "max_new_tokens": 8}
    return build_engine(name, BackboneParams(name=str(folder)), **sizes | wanted)


@pytest.mark.parametrize("name", ENGINES)
def test_an_entry_names_a_class_with_its_version_and_options(name: str) -> None:
    engine = ENGINES[name].engine()
    assert engine.VERSION >= 1
    assert engine.SPEED_OPTIONS
    assert bool(ENGINES[name].stub) == (name == "echo")


def test_every_engine_has_an_entry() -> None:
    """A module with a class that ends in Engine, but for the pool of several."""
    modules = {path.stem for path in (ROOT / "pipeline/generate/engines").glob("*.py") if "class" in path.read_text()}
    assert {entry.path.split(":")[0].rpartition(".")[2] for entry in ENGINES.values()} <= modules


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("echo", "delay", "x"), ("transformers", "batch_size", "8"), ("transformers", "batch_size", 0)],
)
def test_a_mistyped_option_is_named(name: str, option: str, value: Any, tiny_backbone: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=rf"^options: {option}: .*got {value!r}"):
        build(name, tiny_backbone("llama"), options={option: value})


@pytest.mark.parametrize("name", ["echo", "transformers"])
def test_unknown_option_names_the_known_ones(name: str, tiny_backbone: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=r"^options: colour: unknown key \(known: "):
        build(name, tiny_backbone(), options={"colour": 1})


def test_more_tokens_than_positions(tiny_backbone: Callable[..., Path]) -> None:
    message = r"^max_prompt_tokens: 64 \+ max_new_tokens \(449\) = 513 tokens, but .* has 512 positions"
    with pytest.raises(EngineError, match=message):
        build("echo", tiny_backbone(), max_new_tokens=449)


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("vllm", {"data_parallel": 3}, r"^data_parallel\b.* 3 .*2 GPU\(s\) are visible"),
        ("vllm", {"tensor_parallel": 4}, r"^tensor_parallel: 4, but 2 GPU\(s\) are visible"),
        ("transformers", {"tensor_parallel": 2}, r"^tensor_parallel: 2, but engine 'transformers' uses one GPU"),
        ("echo", {"batch_invariant": True}, r"^batch_invariant: only for engine vllm, not for 'echo'"),
        ("openai", {"data_parallel": 2}, r"^data_parallel: 2, but options of engine 'openai'"),
    ],
)
def test_arguments_that_an_engine_cannot_take(
    name: str, wanted: dict[str, Any], message: str,
    tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(EngineError, match=message):
        build(name, tiny_backbone(), **wanted)
