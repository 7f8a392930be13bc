"""The backbone's answers: generated once, by an engine that starts once, and kept in the store."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.errors import EngineError, WorkError
from pipeline.core.row_store import ShardStore
from pipeline.generate.answer_cache import Answers
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.generator import Generator
from pipeline.generate.params import GenerateParams
from pipeline.generate.response_counts import STORE
from tests.conftest import tiny_tokenizer


@dataclass
class Shouting:
    """An engine that answers in capitals; it fails on `refused`, and dies after `lasts` answers."""

    refused: set[str] = field(default_factory=set)
    lasts: int = 1000
    asked: list[str] = field(default_factory=list)
    starts: int = 0
    stops: int = 0

    def load(self) -> "Shouting":
        self.starts += 1
        return self

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        for prompt in prompts:
            if len(self.asked) == self.lasts:
                raise KeyboardInterrupt
            self.asked.append(prompt.text)
            if prompt.text in self.refused:
                yield Completion(prompt.id, "", "error", 0, "no such luck")
            else:
                yield Completion(prompt.id, prompt.text.upper(), "stop", 1)

    def close(self) -> None:
        self.stops += 1


def answers(work: Path, engine: Shouting, **settings: Any) -> Answers:
    def make(store: ShardStore) -> Generator:
        formatter = PromptFormatter(tiny_tokenizer(), "chat", 64)
        return Generator(store, engine.load, formatter, Sampling(8), seed=0, max_failed_fraction=0.5)

    return Answers(lambda: ShardStore(work, STORE, {"of": "a test"}), make, lambda: {"of": "a test"}, **settings)


def test_each_prompt_is_asked_once_and_answers_come_in_the_callers_order(tmp_path: Path) -> None:
    engine = Shouting()
    ask = answers(tmp_path, engine)
    assert ask(["b", "a", "b"]) == ["B", "A", "B"]
    assert ask(["c", "a"]) == ["C", "A"]
    assert ask([]) == []
    assert sorted(engine.asked) == ["a", "b", "c"]


def test_the_engine_starts_at_the_first_miss_and_stays_until_close(tmp_path: Path) -> None:
    engine = Shouting()
    ask = answers(tmp_path, engine)
    assert engine.starts == 0
    ask(["a"])
    ask(["b"])
    assert (engine.starts, engine.stops) == (1, 0)
    ask.close()
    ask.close()
    assert (engine.starts, engine.stops) == (1, 1)
    assert ask(["a", "c"]) == ["A", "C"]
    assert engine.starts == 2


def test_an_engine_that_may_not_stay_stops_after_each_round(tmp_path: Path) -> None:
    engine = Shouting(lasts=2)
    ask = answers(tmp_path, engine, keeps_engine=False)
    ask(["a"])
    assert (engine.starts, engine.stops) == (1, 1)
    with pytest.raises(KeyboardInterrupt):
        ask(["b", "c"])
    assert (engine.starts, engine.stops) == (2, 2)


def test_a_second_run_generates_nothing_anew(tmp_path: Path) -> None:
    answers(tmp_path, Shouting())(["a", "b"])
    idle = Shouting()
    assert answers(tmp_path, idle)(["b", "a"]) == ["B", "A"]
    assert idle.starts == 0


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path, Shouting(lasts=4))(prompts)
    second = Shouting()
    assert answers(tmp_path, second)(prompts) == [prompt.upper() for prompt in prompts]
    assert len(second.asked) == 2


def test_a_failed_prompt_has_no_answer_and_is_asked_again(tmp_path: Path) -> None:
    failing = Shouting(refused={"b"})
    assert answers(tmp_path, failing)(["a", "b", "c"]) == ["A", None, "C"]
    again = Shouting()
    assert answers(tmp_path, again)(["a", "b", "c"]) == ["A", "B", "C"]
    assert again.asked == ["b"]


def test_too_many_failures_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^generate\.max_failed_fraction: 2 of 3 rows failed .*0\.5"):
        answers(tmp_path, Shouting(refused={"a", "b"}))(["a", "b", "c"])


def test_the_store_is_locked_during_a_call_only(tmp_path: Path) -> None:
    ask = answers(tmp_path, Shouting())
    with ShardStore(tmp_path, STORE, {"of": "a test"}), pytest.raises(WorkError, match="in use by another process"):
        ask(["a"])
    assert ask(["a"]) == ["A"]


@pytest.mark.parametrize("engine", ["echo", "transformers"])
def test_the_engine_of_the_params_answers(tmp_path: Path, tiny_backbone: Callable[..., Path], engine: Any) -> None:
    backbone = BackboneParams(name=str(tiny_backbone("llama")), dtype="float32")

    def build(**changes: Any) -> Answers:
        settings = {"engine": engine, "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 40, **changes}
        return Answers.of(backbone, GenerateParams(**settings), tmp_path)

    ask = build()
    first, second = ask(["hello", "bye"])
    ask.close()
    assert first != second
    if engine == "echo":
        assert (first, second) == ("stub answer: hello", "stub answer: bye")
    assert build(max_failed_fraction=0.2).identity == ask.identity
    longer = build(max_new_tokens=9)
    assert longer.identity != ask.identity
    assert longer(["hello"])[0].startswith(first.rstrip("�"))
    longer.close()
    assert len(list(tmp_path.iterdir())) == 2
