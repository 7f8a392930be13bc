"""The stub answers with its prompt."""

from collections.abc import Callable
from pathlib import Path

from pipeline.backbone.loading import BackboneParams
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.echo import EchoEngine
from pipeline.generate.engines.registry import build_engine
from tests.conftest import tiny_tokenizer


def decode(ids: list[int]) -> str:
    return "-".join(map(str, ids))


def test_answers_are_the_prompts_cut_to_the_limit() -> None:
    prompts = [Prompt("a", [1, 2], 0), Prompt("b", [1, 2, 3, 4], 0)]
    assert list(EchoEngine(decode).generate(prompts, Sampling(3))) == [
        Completion("a", "stub answer: 1-2", "stop", 2),
        Completion("b", "stub answer: 1-2-3", "length", 3),
    ]


def test_built_by_name_it_decodes_with_the_tokenizer(tiny_backbone: Callable[..., Path]) -> None:
    prompt = Prompt("a", [0, *tiny_tokenizer()("HI")["input_ids"], 1], 0)
    backbone = BackboneParams(name=str(tiny_backbone()))
    echo = build_engine("echo", backbone, dtype="float32", max_prompt_tokens=64, max_new_tokens=8)
    (answer,) = echo.generate([prompt], Sampling(8))
    assert answer.text == "stub answer: HI"
