"""Several engine processes give the rows of one, whatever the engine takes in hand, and say which of them died."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.echo import EchoEngine
from pipeline.generate.engines.pool import CHUNK, ParallelEngine
from pipeline.generate.engines.registry import build_engine
from pipeline.parallel.devices import Device
from tests.generate.engines.conftest import GREEDY, SIZES, agree

SAMPLING = Sampling(8)
PROMPTS = [Prompt(f"row{index}", [3 + index % 200] * (1 + index % 12), index) for index in range(300)]
DEVICES = [Device("a"), Device("b")]


def decode(ids: list[int]) -> str:
    return "-".join(map(str, ids))


class Hoarder:
    """An echo that takes many prompts before it answers the first, as batching engines do."""

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        yield from EchoEngine(decode).generate(list(prompts), sampling)

    def close(self) -> None:
        pass


class Faulty:
    """An echo that breaks or dies at a certain row; in a row's text it says who it is."""

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        for prompt in prompts:
            if prompt.id == "break":
                raise EngineError("the engine is broken")
            if prompt.id == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            yield Completion(prompt.id, str(os.getpid()), "stop", 1)

    def close(self) -> None:
        pass


def echo() -> EchoEngine:
    return EchoEngine(decode, delay=0.002)


def refuse() -> EchoEngine:
    raise EngineError("no engine today")


def rows(completions: Iterable[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: completion.id)


@pytest.mark.parametrize("load", [echo, Hoarder])
def test_the_rows_of_one_engine(load: Callable[[], Any]) -> None:
    with closing(ParallelEngine(load, DEVICES)) as engine:
        found = list(engine.generate(iter(PROMPTS), SAMPLING))
        again = list(engine.generate(PROMPTS[:3], SAMPLING))
        assert list(engine.generate([], SAMPLING)) == []
    expected = rows(EchoEngine(decode).generate(PROMPTS, SAMPLING))
    assert rows(found) == expected
    assert rows(again) == rows(EchoEngine(decode).generate(PROMPTS[:3], SAMPLING))


def test_both_work_and_prompts_are_a_stream() -> None:
    taken = []

    def prompts() -> Iterator[Prompt]:
        for prompt in PROMPTS:
            taken.append(prompt)
            yield prompt

    with closing(ParallelEngine(Faulty, DEVICES)) as engine:
        completions = engine.generate(prompts(), SAMPLING)
        first = next(completions)
        assert len(taken) <= 4 * CHUNK * len(DEVICES)
        workers = {first.text, *(completion.text for completion in completions)}
    assert len(workers) == 2
    assert len(taken) == len(PROMPTS)


def test_an_abandoned_round_leaves_the_engines_usable() -> None:
    with closing(ParallelEngine(echo, DEVICES)) as engine:
        for _ in range(3):
            completions = engine.generate(PROMPTS, SAMPLING)
            next(completions)
            completions.close()  # type: ignore[attr-defined]
        assert len(list(engine.generate(PROMPTS, SAMPLING))) == len(PROMPTS)


def test_an_error_of_one_engine_names_its_process() -> None:
    with closing(ParallelEngine(Faulty, DEVICES)) as engine:
        completions = engine.generate([*PROMPTS[:40], Prompt("break", [1], 0), *PROMPTS[40:]], SAMPLING)
        with pytest.raises(EngineError, match=r"engine process [01] \([ab]\): the engine is broken"):
            list(completions)


def test_a_dead_engine_is_named_after_the_rows_that_were_finished() -> None:
    found = []
    with closing(ParallelEngine(Faulty, DEVICES)) as engine:
        completions = engine.generate([*PROMPTS[:100], Prompt("die", [1], 0)], SAMPLING)
        with pytest.raises(EngineError, match=r"engine process [01] \([ab]\) died \(killed by SIGKILL"):
            for completion in completions:
                found.append(completion)  # noqa: PERF402 - the rows before the error count
    # All but what the two had in hand.
    assert len({completion.id for completion in found}) >= 100 - 4 * CHUNK


def test_an_engine_that_does_not_load() -> None:
    with pytest.raises(EngineError, match=r"engine process [01] \([ab]\): no engine today"):
        ParallelEngine(refuse, DEVICES)


@pytest.mark.slow
def test_by_name(tiny_backbone: Callable[..., Path]) -> None:
    backbone = BackboneParams(name=str(tiny_backbone()))
    with closing(build_engine("echo", backbone, **SIZES, data_parallel=2)) as engine:
        assert isinstance(engine, ParallelEngine)
        found = rows(engine.generate(PROMPTS, SAMPLING))
    alone = build_engine("echo", backbone, **SIZES, data_parallel="auto")
    assert isinstance(alone, EchoEngine)
    assert found == rows(alone.generate(PROMPTS, SAMPLING))


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.slow
def test_two_vllm_processes_answer_as_one_model(
    small_lm: Path, questions: list[Prompt], by_transformers: dict[str, Completion]
) -> None:
    pytest.importorskip("vllm")
    backbone, options = BackboneParams(name=str(small_lm)), {"max_num_seqs": 8}
    with closing(build_engine("vllm", backbone, **SIZES, data_parallel=2, options=options)) as engine:
        found = {answer.id: answer for answer in engine.generate(questions, GREEDY)}
        many = [Prompt(f"{prompt.id}-{i}", prompt.token_ids, i) for i in range(50) for prompt in questions]
        completions = engine.generate(many, GREEDY)
        next(completions)
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()
        with pytest.raises(EngineError, match=r"engine process \d \(cores .*\) died \(killed by SIGKILL"):
            list(completions)
    assert agree(found, by_transformers)
    assert not any(worker.is_running() for worker in workers)
