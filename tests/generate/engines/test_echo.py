"""The stub answers with its prompt, says that it is a stub, and every engine is reached by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines import build_engine, engine_facts
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.echo import EchoEngine
from tests.conftest import tiny_tokenizer


def decode(ids: list[int]) -> str:
    return "-".join(map(str, ids))


def build(name: Any, folder: Path, options: dict[str, Any] | None = None, max_new_tokens: int = 8) -> Any:
    backbone = BackboneParams(name=str(folder))
    return build_engine(
        name, backbone, dtype="float32", max_prompt_tokens=64, max_new_tokens=max_new_tokens, options=options
    )


def test_answers_are_the_prompts_cut_to_the_limit() -> None:
    prompts = [Prompt("a", [1, 2], 0), Prompt("b", [1, 2, 3, 4], 0)]
    assert list(EchoEngine(decode).generate(prompts, Sampling(3))) == [
        Completion("a", "stub answer: 1-2", "stop", 2),
        Completion("b", "stub answer: 1-2-3", "length", 3),
    ]


def test_built_by_name_it_decodes_with_the_tokenizer(tiny_backbone: Callable[..., Path]) -> None:
    prompt = Prompt("a", [0, *tiny_tokenizer()("HI")["input_ids"], 1], 0)
    (answer,) = build("echo", tiny_backbone()).generate([prompt], Sampling(8))
    assert answer.text == "stub answer: HI"


def test_only_the_stub_says_that_it_is_one() -> None:
    assert [engine_facts(name).stub for name in ("vllm", "transformers", "echo")] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("echo", "delay", "x"), ("transformers", "batch_size", "8"), ("transformers", "batch_size", 0)],
)
def test_a_mistyped_option_is_named(name: str, option: str, value: Any, tiny_backbone: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=rf"generate\.options: {option}: .*got {value!r}"):
        build(name, tiny_backbone("llama"), {option: value})


@pytest.mark.parametrize("name", ["echo", "transformers"])
def test_unknown_option_names_the_known_ones(name: str, tiny_backbone: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=r"generate\.options: colour: unknown key \(known: "):
        build(name, tiny_backbone(), {"colour": 1})


def test_more_tokens_than_positions(tiny_backbone: Callable[..., Path]) -> None:
    message = r"max_prompt_tokens \(64\) \+ generate.max_new_tokens \(449\) = 513 tokens, but .* has 512 positions"
    with pytest.raises(EngineError, match=message):
        build("echo", tiny_backbone(), max_new_tokens=449)
