"""The resumable loop with engines whose answers are known in advance."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import PART_BYTES
from pipeline.core.config import validate
from pipeline.core.errors import EngineError, ParamsError
from pipeline.core.row_store import ShardStore
from pipeline.core.schemas import RESPONSES, check_table
from pipeline.generate import generator as generation
from pipeline.generate.engines.base import Completion, MakeQueries, Prompt, Query, Sampling
from pipeline.generate.generator import Generator, rows_per_part
from pipeline.generate.params import GenerateParams
from pipeline.generate.queries import row_seed
from pipeline.generate.response_counts import STORE, ResponseCounts
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


def sorted_ids(queries: Mapping[str, str]) -> pa.Array:
    return pa.array(sorted(queries), pa.string())


def batches(queries: Mapping[str, str], window: int) -> Iterator[pa.Table]:
    """The queries as the artifact gives them."""
    table = pa.table({"id": sorted(queries), "text": [queries[row_id] for row_id in sorted(queries)]})
    for start in range(0, len(queries), window):
        yield table.slice(start, window)


def responses(table: pa.Table) -> pa.Table:
    return pa.concat_tables(ResponseCounts().through([table]))


def counts(table: pa.Table, rows_per_table: int = 4) -> dict[str, Any]:
    """What is counted of a table that passes in pieces."""
    counted = ResponseCounts()
    pieces = (table.slice(start, rows_per_table) for start in range(0, table.num_rows, rows_per_table))
    assert sum(piece.num_rows for piece in counted.through(pieces)) == table.num_rows
    return counted.summary()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Generator, pa.Table]]:
    """Run the loop with an engine over the same store and give the generator and its rows."""

    def run(
        engine: FakeEngine,
        queries: Mapping[str, str] = QUERIES,
        limit: float = 1.0,
        max_tokens: int = 64,
        part: int = 7,
        window: int = 100,
        folder: str = "work",
        **settings: Any,
    ) -> tuple[Generator, pa.Table]:
        formatter = PromptFormatter(tiny_tokenizer(), "chat", max_tokens)
        with ShardStore(tmp_path / folder, STORE, {"max_tokens": max_tokens}) as store:
            generator = Generator(store, lambda: engine, formatter, SAMPLING, 5, limit, **settings)
            ids = sorted_ids(queries)
            generator.run(lambda: [ids[:3], ids[3:]], batches(queries, window))
            return generator, pa.concat_tables(generator.tables([ids[:3], ids[3:]], part))

    return run


Run = Callable[..., tuple[Generator, pa.Table]]


def test_one_row_a_query_sorted_and_closed(run: Run) -> None:
    engine = FakeEngine()
    generator, table = run(engine)
    check_table(responses(table), RESPONSES, "responses")
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
    assert {prompt.id for prompt in engine.asked} == {"00a", "zz"}
    assert table.num_rows == 22


def test_a_failed_row_is_tried_once_more(run: Run) -> None:
    engine = FakeEngine(fails={"03": 1})
    generator, table = run(engine, limit=0.0)
    assert [prompt.id for prompt in engine.asked].count("03") == 2
    assert generator.facts.retried_rows == 1
    assert set(table["finish_reason"].to_pylist()) == {"stop"}


def test_a_row_that_fails_twice_is_recorded_and_retried_by_the_next_run(run: Run) -> None:
    _, table = run(FakeEngine(fails={"03": 2, "11": 2}))
    check_table(responses(table), RESPONSES, "responses")
    failed = [row for row in table.to_pylist() if row["finish_reason"] == "error"]
    assert [(row["id"], row["response"], row["error"]) for row in failed] == [
        ("03", "", "out of luck: 03"),
        ("11", "", "out of luck: 11"),
    ]
    engine = FakeEngine(fails={"11": 2})
    _, table = run(engine)
    check_table(responses(table), RESPONSES, "responses")
    assert {prompt.id for prompt in engine.asked} == {"03", "11"}
    assert table.filter(pa.compute.equal(table["finish_reason"], "error"))["id"].to_pylist() == ["11"]


def test_too_many_failures_say_how_many_and_why(run: Run) -> None:
    fails = {"03": 2, "11": 2}
    message = r"^max_failed_fraction: 2 of 20 rows failed \(2 x out of luck\), e.g. id 03; .*0.09"
    with pytest.raises(EngineError, match=message) as caught:
        run(FakeEngine(fails), limit=0.09)
    listing = re.search(r"(\S+failed\.json) lists", str(caught.value))
    assert listing
    assert json.loads(Path(listing[1]).read_text()) == {"03": "out of luck: 03", "11": "out of luck: 11"}
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


def test_an_engine_that_ends_before_it_took_all_prompts_is_noticed(run: Run) -> None:
    class Lazy(FakeEngine):
        def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
            return iter(())

    with pytest.raises(EngineError, match="no answer for 20 prompts, e.g. 00"):
        run(Lazy())


TIMES = {"startup_seconds": 0, "generate_seconds": 0, "gpu_memory_mib": {}}


class OnCluster(FakeEngine):
    """Reads the rows itself."""

    folder: Path

    def answer(self, folder: Path, make: MakeQueries, sampling: Sampling) -> Iterator[tuple[Query, Completion]]:
        self.folder, rows = folder, pa.concat_tables(pq.read_table(part) for part in sorted(folder.iterdir()))
        assert rows["number"].to_pylist() == list(range(rows.num_rows))
        queries = {query.prompt.id: query for query in make(rows)}
        yield from ((query, Completion.failed(i, query.refused)) for i, query in queries.items() if query.refused)
        asked = (query.prompt for query in queries.values() if not query.refused)
        yield from ((queries[found.id], found) for found in self.generate(asked, sampling))


def test_an_engine_that_reads_the_rows_itself_gives_the_same(run: Run) -> None:
    texts = QUERIES | {"a": "long " * 20, "b": "long " * 20}
    one, expected = run(FakeEngine(fails={"03": 1, "04": 2}), texts, drop_too_long=True, folder="one")
    engine = OnCluster(fails={"03": 1, "04": 2})
    found, table = run(engine, texts, drop_too_long=True, folder="cluster", window=8)
    assert table.equals(expected)
    assert {**vars(found.facts), **TIMES} == {**vars(one.facts), **TIMES}
    assert (found.facts.computed_rows, found.facts.dropped_rows, found.facts.retried_rows) == (19, 2, 2)
    assert not engine.folder.exists()


def test_truncated_empty_and_looping_rows_are_counted_also_after_a_resume(run: Run) -> None:
    class Mute(FakeEngine):
        def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
            answers = {"00": " \n", "01": "", "02": "round and " * 20, "03": "<think>hm</think> yes"}
            return (Completion(p.id, answers.get(p.id, "x"), "length", 4) for p in prompts)

    queries = QUERIES | {"long": "much too long " * 9, "05": "a <|end|>"}
    for _ in range(2):
        _, table = run(Mute(), queries)
        assert counts(table) == {
            "finish_reason": {"stop": 0, "length": 21, "error": 0},
            "empty_responses": 2,
            "equal_responses": 16,
            "left_thinking": 0,
            "equal_prompts": 0,
            "truncated_prompts": 1,
            "control_token_prompts": 1,
            "stripped_thinking": 1,
            "repetition_loops": 1,
            "errors": {},
        }
    assert table["response"].to_pylist()[3] == "yes"


def test_the_first_rows_are_looked_at_once_and_those_of_the_store_are_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "FIRST_ROWS", 8)
    seen: list[pa.Table] = []
    run(FakeEngine(), look=seen.append)
    [first] = seen
    assert (first.num_rows, first.schema) == (8, STORE)
    run(FakeEngine(), QUERIES | {f"new {index}": f"new {index}" for index in range(7)}, look=seen.append)
    assert len(seen) == 1


def test_prompts_that_became_equal_are_counted(run: Run) -> None:
    """A limit that cuts what differs."""
    _, table = run(FakeEngine(), {"a": "same beginning 1", "b": "same beginning 2", "c": "other"}, max_tokens=12)
    assert counts(table)["equal_prompts"] == 1


def test_failed_rows_are_counted_by_reason_and_not_as_empty(run: Run) -> None:
    _, table = run(FakeEngine(fails={"03": 2, "11": 2}))
    assert counts(table)["errors"] == {"out of luck": 2}
    assert counts(table)["empty_responses"] == 0


def test_thinking_stays_when_it_is_asked_to(run: Run) -> None:
    class Thinker(FakeEngine):
        def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
            return (Completion(p.id, "<think>hm</think> yes", "stop", 4) for p in prompts)

    _, table = run(Thinker(), strip_thinking=False)
    assert set(table["response"].to_pylist()) == {"<think>hm</think> yes"}
    assert counts(table)["stripped_thinking"] == 0


def test_a_dropped_query_is_recorded_once_and_is_no_failure(run: Run) -> None:
    queries = QUERIES | {"long": "much too long " * 9}
    engine = FakeEngine()
    for _ in range(2):
        _, table = run(engine, queries, limit=0.0, drop_too_long=True)
        check_table(responses(table), RESPONSES, "responses")
        dropped = [row for row in table.to_pylist() if row["finish_reason"] == "error"]
        assert [(row["id"], row["error"]) for row in dropped] == [("long", "dropped: longer than max_prompt_tokens")]
        assert counts(table)["errors"] == {"dropped": 1}
        assert counts(table)["truncated_prompts"] == 0
    assert "long" not in {prompt.id for prompt in engine.asked}
    assert len(engine.asked) == 20


def test_dropped_rows_are_told_from_computed_ones(run: Run) -> None:
    generator, _ = run(FakeEngine(), QUERIES | {"long": "much too long " * 9}, drop_too_long=True)
    facts = generator.facts
    assert (facts.rows, facts.computed_rows, facts.dropped_rows, facts.reused_rows) == (21, 20, 1, 0)


def test_only_dropped_queries_start_no_engine(run: Run) -> None:
    engine = FakeEngine()
    _, table = run(engine, {"long": "much too long " * 9}, drop_too_long=True)
    assert table.num_rows == 1
    assert not engine.closed


def test_the_longest_prompts_of_a_window_go_first(run: Run) -> None:
    engine = FakeEngine()
    run(engine, {"a": "x", "b": "xxx", "c": "xx", "d": "xxxx"}, window=3)
    assert [prompt.id for prompt in engine.asked] == ["b", "c", "a", "d"]
    assert [prompt.text for prompt in engine.asked] == ["xxx", "xx", "x", "xxxx"]


def test_failures_are_listed_until_a_run_has_none(run: Run) -> None:
    generator, _ = run(FakeEngine(fails={"03": 2}))
    listing = generator.store.path / "failed.json"
    assert json.loads(listing.read_text()) == {"03": "out of luck: 03"}
    run(FakeEngine())
    assert not listing.exists()


def test_many_failures_within_the_limit_are_said_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation, "HOPELESS", 5)
    run(FakeEngine(fails=dict.fromkeys(QUERIES, 2)), limit=1.0)
    assert len([each for each in caplog.messages if "within max_failed_fraction" in each]) == 1


def test_a_hopeless_run_ends_early(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "HOPELESS", 5)
    engine = FakeEngine(fails=dict.fromkeys(QUERIES, 2))
    with pytest.raises(EngineError, match=r"5 of 20 rows failed"):
        run(engine, limit=0.2)
    assert len(engine.asked) == 5
    assert engine.closed


def test_each_row_has_its_own_seed_in_every_run(run: Run) -> None:
    engine = FakeEngine()
    run(engine)
    assert {prompt.id: prompt.seed for prompt in engine.asked} == {row_id: row_seed(5, row_id) for row_id in QUERIES}
    assert len({prompt.seed for prompt in engine.asked}) == 20
    assert row_seed(5, "00") != row_seed(6, "00")
    assert 0 <= row_seed(5, "00") < 2**63


def test_samples_have_seeds_of_their_own_and_more_of_them_compute_the_new_ones(run: Run) -> None:
    one = FakeEngine()
    run(one)
    three = FakeEngine(fails={"03.01": 2})
    generator, table = run(three, samples=3, window=7)
    assert {prompt.id for prompt in three.asked} == {
        f"{row_id}.{number}" for row_id in QUERIES for number in ("01", "02")
    }
    assert {prompt.id: prompt.seed for prompt in three.asked}["07.02"] == row_seed(5, "07.02")
    assert (generator.facts.rows, generator.facts.reused_rows, generator.facts.computed_rows) == (60, 20, 39)
    assert table["id"].to_pylist() == sorted(QUERIES)
    assert table["response"].to_pylist() == run(FakeEngine())[1]["response"].to_pylist()
    assert [len(more) for more in table["samples"].to_pylist()] == [2, 2, 2, 1, *[2] * 16]
    assert counts(table)["equal_prompts"] == 0  # samples of a query are no repetition


def test_the_first_samples_alone_are_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.generate.generator.FIRST_ROWS", 10)
    looked: list[pa.Table] = []
    run(FakeEngine(), samples=3, look=looked.append)
    assert all("." not in row_id for table in looked for row_id in table["id"].to_pylist())


def params(**keys: Any) -> GenerateParams:
    content = {"engine": "echo", "dtype": "float32", "max_new_tokens": 4, "max_prompt_tokens": 8} | keys
    return validate(content, GenerateParams, where="params.yaml")


def test_speed_and_tolerance_do_not_change_the_content() -> None:
    base = params().content()
    speed = params(options={"delay": 1.0}, max_failed_fraction=0.5, data_parallel=2, tensor_parallel=4)
    assert params(gates={"empty": 0.9}).content() == base
    assert speed.content() == base
    assert base["stub"] is True
    assert "system" not in base  # as before there was one
    assert params(seed=1, top_p=0.5).content() == base  # greedy reads neither
    assert params(temperature=1.0, samples_per_query=3).content() == params(temperature=1.0).content()
    assert params(seed=1, temperature=1.0).content() != params(temperature=1.0).content()
    for change in (
        {"temperature": 1.0},
        {"max_prompt_tokens": 9},
        {"dtype": "bfloat16"},
        {"too_long": "drop"},
        {"system": ""},
        {"system": "Be brief."},
    ):
        assert params(**change).content() != base
    assert params(engine="vllm", options={"max_num_seqs": 9}).content() == params(engine="vllm").content()
    quantised = params(engine="vllm", options={"quantization": "fp8"}).content()
    assert (quantised["options"], quantised["stub"]) == ({"quantization": "fp8"}, False)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"top_p": 0.0}, {"temperature": -1.0}, {"seed": -1}, {"engine": "vlm"}),
        *({"samples_per_query": 3}, {"samples_per_query": 0}),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=next(iter(wrong))):
        params(**wrong)


def test_parts_are_bounded() -> None:
    assert rows_per_part(500) * (256 + 8 * 500) <= PART_BYTES
    assert rows_per_part(10**9) == 1
