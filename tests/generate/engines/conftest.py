"""What the tests of engines share: the environment put back, and answers of a real model by transformers."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing

import pytest

from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.registry import build_engine
from tests.conftest import SMALL_LM

QUESTIONS = [
    "What is the capital of France?", "How do I boil an egg?", "What is 12 times 7?", "Who wrote Hamlet?",
    "Write a Python function that reverses a string.", "Is 'great phone' a positive review?", "Name three planets.",
    "Why is the sky blue?", "How can I sleep better?", "Translate 'good morning' into Spanish.", "What is DNA?",
    "Explain rain to a child.",
]  # fmt: skip
GREEDY = Sampling(max_new_tokens=16)
SIZES = {"dtype": "float32", "max_prompt_tokens": 80, "max_new_tokens": GREEDY.max_new_tokens}


@pytest.fixture
def environment() -> Iterator[None]:
    """Ray and vLLM write into os.environ; put it back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def questions() -> list[Prompt]:
    """The questions as prompts q0, q1, ... of the small LM, or a skip that says so."""
    if not SMALL_LM.is_dir():
        pytest.skip("run `make models` first")
    formatter = PromptFormatter(load_tokenizer(BackboneParams(name=str(SMALL_LM))), "chat", 80)
    formatted = enumerate(map(formatter, QUESTIONS))
    return [Prompt(f"q{index}", prompt.token_ids, index, prompt.text) for index, prompt in formatted]


@pytest.fixture(scope="session")
def by_transformers(questions: list[Prompt]) -> dict[str, Completion]:
    """The small LM's greedy answers to the questions, by id."""
    with closing(build_engine("transformers", BackboneParams(name=str(SMALL_LM)), **SIZES)) as engine:
        return {answer.id: answer for answer in engine.generate(questions, GREEDY)}


def agree(found: Mapping[str, Completion], expected: Mapping[str, Completion], most_different: int = 3) -> bool:
    """Whether nearly all answers are equal: kernels round differently, which flips near ties."""
    return sum(found[row] != answer for row, answer in expected.items()) <= most_different
