"""The resumable loop with engines whose answers are known in advance."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.backbone import PromptFormatter
from pipeline.contracts import RESPONSES, check_table
from pipeline.engines import engine_facts
from pipeline.engines.base import Completion, Prompt, Sampling
from pipeline.errors import EngineError, ParamsError
from pipeline.generation import STORE, GenerateParams, Generator, ResponseCounts, row_seed, rows_per_part
from pipeline.params import validate
from pipeline.shards import ShardStore
from tests.conftest import tiny_tokenizer

QUERIES = {f"{index:02d}": f"question {index}" for index in range(20)}
SAMPLING = Sampling(4)


class FakeEngine:
    """Answers "re: <number of prompt tokens>"; a row fails as often as `fails` says; counts what it is asked."""

    def __init__(self, fails: Mapping[str, int] | None = None, breaks_after: int | None = None) -> None:
        self.fails = dict(fails or {})
        self.breaks_after = breaks_after
        self.asked: list[Prompt] = []
        self.closed = False

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        for prompt in prompts:
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise EngineError("the engine is gone")
            self.asked.append(prompt)
            if self.fails.get(prompt.id, 0) > 0:
                self.fails[prompt.id] -= 1
                yield Completion(prompt.id, "", "error", 0, f"out of luck: {prompt.id}")
            else:
                yield Completion(prompt.id, f"re: {len(prompt.token_ids)}", "stop", 3)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Generator, pa.Table]]:
    """Run the loop with an engine over the same store and give the generator and its rows."""

    def run(
        engine: FakeEngine,
        queries: Mapping[str, str] = QUERIES,
        limit: float = 1.0,
        max_tokens: int = 64,
        part: int = 7,
    ) -> tuple[Generator, pa.Table]:
        formatter = PromptFormatter(tiny_tokenizer(), "chat", max_tokens)
        with ShardStore(tmp_path / "work", STORE, {"max_tokens": max_tokens}) as store:
            generator = Generator(store, lambda: engine, formatter, SAMPLING, 5, limit)
            generator.run(queries)
            return generator, pa.concat_tables(ResponseCounts().through(generator.tables(queries, part)))

    return run


Run = Callable[..., tuple[Generator, pa.Table]]


def test_one_row_a_query_sorted_and_closed(run: Run) -> None:
    engine = FakeEngine()
    generator, table = run(engine)
    check_table(table, RESPONSES, "responses")
    assert table.column("id").to_pylist() == sorted(QUERIES)
    # <|user|> + one token a byte + <|end|> + <|bot|>
    expected = {row_id: len(text) + 3 for row_id, text in QUERIES.items()}
    assert dict(zip(table["id"].to_pylist(), table["prompt_tokens"].to_pylist(), strict=True)) == expected
    assert table["response"].to_pylist() == [f"re: {expected[row_id]}" for row_id in sorted(QUERIES)]
    assert engine.closed
    facts = generator.facts.summary()
    assert (facts["rows"], facts["computed_rows"], facts["reused_rows"]) == (20, 20, 0)
    assert (facts["prompt_tokens"], facts["response_tokens"]) == (sum(expected.values()), 60)


def test_nothing_left_to_do_starts_no_engine(run: Run) -> None:
    _, first = run(FakeEngine())
    engine = FakeEngine()
    generator, second = run(engine)
    assert second.equals(first)
    assert not engine.asked
    assert not engine.closed
    assert generator.facts.reused_rows == 20


def test_a_larger_corpus_computes_only_its_new_rows(run: Run) -> None:
    run(FakeEngine())
    engine = FakeEngine()
    _, table = run(engine, QUERIES | {"00a": "new", "zz": "also new"})
    assert [prompt.id for prompt in engine.asked] == ["00a", "zz"]
    assert table.num_rows == 22


def test_a_failed_row_is_tried_once_more(run: Run) -> None:
    engine = FakeEngine(fails={"03": 1})
    generator, table = run(engine, limit=0.0)
    assert [prompt.id for prompt in engine.asked].count("03") == 2
    assert generator.facts.retried_rows == 1
    assert set(table["finish_reason"].to_pylist()) == {"stop"}


def test_a_row_that_fails_twice_is_recorded_and_retried_by_the_next_run(run: Run) -> None:
    _, table = run(FakeEngine(fails={"03": 2, "11": 2}))
    check_table(table, RESPONSES, "responses")
    failed = [row for row in table.to_pylist() if row["finish_reason"] == "error"]
    assert [(row["id"], row["response"], row["error"]) for row in failed] == [
        ("03", "", "out of luck: 03"),
        ("11", "", "out of luck: 11"),
    ]
    engine = FakeEngine(fails={"11": 2})
    _, table = run(engine)
    check_table(table, RESPONSES, "responses")
    assert {prompt.id for prompt in engine.asked} == {"03", "11"}
    assert table.filter(pa.compute.equal(table["finish_reason"], "error"))["id"].to_pylist() == ["11"]


def test_too_many_failures_say_how_many_and_why(run: Run) -> None:
    fails = {"03": 2, "11": 2}
    message = r"2 of 20 rows failed twice \(2 x out of luck\), e.g. id 03; generate.max_failed_fraction is 0.09"
    with pytest.raises(EngineError, match=message):
        run(FakeEngine(fails), limit=0.09)
    run(FakeEngine(fails), limit=0.1)


def test_a_broken_engine_keeps_finished_rows(run: Run) -> None:
    broken = FakeEngine(breaks_after=12)
    with pytest.raises(EngineError, match="the engine is gone"):
        run(broken)
    assert broken.closed
    engine = FakeEngine()
    run(engine)
    assert {prompt.id for prompt in broken.asked}.isdisjoint(prompt.id for prompt in engine.asked)


def test_an_engine_that_swallows_rows_is_noticed(run: Run) -> None:
    class Swallower(FakeEngine):
        def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
            return (answer for answer in super().generate(prompts, sampling) if answer.id != "07")

    with pytest.raises(EngineError, match="no answer for 1 prompts, e.g. 07"):
        run(Swallower())


def test_truncated_and_empty_rows_are_counted_also_after_a_resume(run: Run) -> None:
    class Mute(FakeEngine):
        def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
            return (Completion(p.id, " \n" if p.id < "05" else "x", "length", 4) for p in prompts)

    queries = QUERIES | {"long": "much too long " * 9}
    for _ in range(2):
        generator, _ = run(Mute(), queries)
        counts = ResponseCounts()
        assert sum(table.num_rows for table in counts.through(generator.tables(queries, 4))) == 21
        assert counts.summary() == {
            "finish_reason": {"stop": 0, "length": 21, "error": 0},
            "empty_responses": 5,
            "truncated_prompts": 1,
            "errors": {},
        }


def test_failed_rows_are_counted_by_reason_and_not_as_empty(run: Run) -> None:
    generator, _ = run(FakeEngine(fails={"03": 2, "11": 2}))
    counts = ResponseCounts()
    assert sum(table.num_rows for table in counts.through(generator.tables(QUERIES, 3))) == 20
    assert counts.summary()["errors"] == {"out of luck": 2}
    assert counts.summary()["empty_responses"] == 0


def test_each_row_has_its_own_seed_in_every_run(run: Run) -> None:
    engine = FakeEngine()
    run(engine)
    assert {prompt.id: prompt.seed for prompt in engine.asked} == {row_id: row_seed(5, row_id) for row_id in QUERIES}
    assert len({prompt.seed for prompt in engine.asked}) == 20
    assert row_seed(5, "00") != row_seed(6, "00")
    assert 0 <= row_seed(5, "00") < 2**63


def params(**keys: Any) -> GenerateParams:
    content = {"engine": "echo", "dtype": "float32", "max_new_tokens": 4, "max_prompt_tokens": 8} | keys
    return validate(content, GenerateParams, where="params.yaml")


def test_speed_and_tolerance_do_not_change_the_content() -> None:
    facts = engine_facts("echo")
    base = params().content(facts)
    assert params(options={"delay": 1.0}, max_failed_fraction=0.5).content(facts) == base
    assert base["stub"] is True
    for change in ({"seed": 1}, {"temperature": 1.0}, {"max_prompt_tokens": 9}, {"dtype": "bfloat16"}):
        assert params(**change).content(facts) != base
    vllm = engine_facts("vllm")
    assert params(engine="vllm", options={"max_num_seqs": 9}).content(vllm) == params(engine="vllm").content(vllm)
    quantised = params(engine="vllm", options={"quantization": "fp8"}).content(vllm)
    assert quantised["options"] == {"quantization": "fp8"}


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"temperature": -1.0}, {"max_failed_fraction": 1.5}, {"seed": -1}])
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=next(iter(wrong))):
        params(**wrong)


def test_parts_are_bounded() -> None:
    assert rows_per_part(500) * (256 + 8 * 500) <= 256 * 2**20
    assert rows_per_part(10**9) == 1
