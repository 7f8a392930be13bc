"""The fallback engine against `generate` of one row, on real architectures with random weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.transformers import TransformersEngine, stop_token_ids
from tests.conftest import tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "qwen3", "gemma3"]
ROWS = [[0, 50, 60, 1], [0, 5, 1], [0, *range(40, 75), 1], [0, 99, 98, 97, 96, 1], [0, 30, 1]]
PROMPTS = [Prompt(f"row{index}", ids, seed=index) for index, ids in enumerate(ROWS)]


def engine(architecture: str = "llama", batch_size: int = 2, max_model_len: int = 64) -> TransformersEngine:
    return TransformersEngine(
        tiny_model(architecture), tiny_tokenizer(), max_model_len=max_model_len, batch_size=batch_size
    )


def answers(engine: TransformersEngine, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, Completion]:
    return {completion.id: completion for completion in engine.generate(iter(prompts), sampling)}


def one_row(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    row = torch.tensor([ids])
    output = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=new_tokens, do_sample=False, pad_token_id=2
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_batches_equal_generate_of_one_row(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    found = answers(engine(architecture, batch_size=3), PROMPTS, Sampling(12))
    for prompt in PROMPTS:
        tokens = one_row(model, prompt.token_ids, 12)
        ended = tokens[-1] == 2
        assert found[prompt.id].text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert found[prompt.id].finish_reason == ("stop" if ended else "length")
        assert found[prompt.id].response_tokens == len(tokens)


def test_stops_at_each_eos_of_the_generation_config() -> None:
    """Whatever the model writes second becomes a stop token: then the answer is one token and the stop."""
    model = tiny_model()
    tokens = one_row(model, ROWS[0], 4)
    assert tokens[0] != tokens[1]
    model.generation_config.eos_token_id = [2, tokens[1]]
    stopping = TransformersEngine(model, tiny_tokenizer(), max_model_len=64)
    (answer,) = stopping.generate(PROMPTS[:1], Sampling(4))
    assert stop_token_ids(model, tiny_tokenizer()) == sorted({2, tokens[1]})
    assert (answer.finish_reason, answer.response_tokens) == ("stop", 2)
    assert answer.text == tiny_tokenizer().decode(tokens[:1])


def test_without_a_stop_token_answers_end_at_the_limit() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    found = answers(TransformersEngine(model, tokenizer, max_model_len=64), PROMPTS, Sampling(12))
    assert {(answer.finish_reason, answer.response_tokens) for answer in found.values()} == {("length", 12)}


def test_defaults_of_the_models_file_do_not_change_greedy() -> None:
    model = tiny_model()
    expected = answers(TransformersEngine(model, tiny_tokenizer(), max_model_len=64), PROMPTS, Sampling(12))
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0)
    assert answers(TransformersEngine(model, tiny_tokenizer(), max_model_len=64), PROMPTS, Sampling(12)) == expected


def test_a_sampled_row_depends_on_its_seed_and_not_on_its_batch() -> None:
    hot = Sampling(8, temperature=1.5, top_p=0.95)
    together = answers(engine(batch_size=5), PROMPTS, hot)
    assert answers(engine(batch_size=1), list(reversed(PROMPTS)), hot) == together
    reseeded = [Prompt(prompt.id, prompt.token_ids, prompt.seed + 100) for prompt in PROMPTS]
    assert all(answers(engine(), reseeded, hot)[row].text != together[row].text for row in together)


def test_a_tiny_top_p_is_greedy() -> None:
    greedy = answers(engine(), PROMPTS, Sampling(8))
    assert answers(engine(), PROMPTS, Sampling(8, temperature=1.0, top_p=1e-6)) == greedy


def test_bad_prompts_fail_alone() -> None:
    bad = [Prompt("long", [5] * 60, 0), Prompt("stranger", [0, 9999, 1], 0)]
    found = answers(engine(batch_size=8), [*PROMPTS, *bad], Sampling(12))
    assert found["long"].error == "prompt too long: 60 tokens + 12 new ones exceed 64"
    assert found["stranger"].finish_reason == "error"
    assert "IndexError" in str(found["stranger"].error)
    alone = answers(engine(), PROMPTS, Sampling(12))
    assert {row: found[row] for row in alone} == alone


def test_prompts_are_a_stream() -> None:
    """The first answers come before the last prompts are asked for."""
    taken = []

    def prompts() -> Any:
        for index in range(100):
            taken.append(index)
            yield Prompt(str(index), [0, 5, 1], 0)

    next(engine(batch_size=2).generate(prompts(), Sampling(1)))
    assert len(taken) < 100
