"""Joining, tokenising and ordering of training rows."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.backbone.prompting import PromptFormatter
from pipeline.core import schemas
from pipeline.core.errors import TrainingError
from pipeline.train.data import drop_loops, join, tokenize
from tests.conftest import tiny_tokenizer


def tables(finish: str = "stop", blank: str = "b") -> tuple[pa.Table, pa.Table, pa.Table]:
    """Queries a, b, c; responses a, b, c, d, of which `blank` is; targets a, c, d."""
    queries = pa.table({"id": ["a", "b", "c"], "text": ["qa", "qb", "qc"], "source": ["s"] * 3}, schemas.QUERIES)
    responses = pa.Table.from_pylist(
        [
            {
                "id": name,
                "response": " " if name == blank else f"r{name}",
                "finish_reason": finish,
                "prompt_tokens": 1,
                "response_tokens": 2,
            }
            for name in "abcd"
        ],
        schemas.RESPONSES,
    )
    targets = pa.Table.from_pylist(
        [{"id": name, "embedding": [float(ord(name)), 0.5]} for name in "acd"], schemas.targets_schema(2, "float16")
    )
    return queries, responses, targets


def test_join_keeps_queries_with_a_target_in_order() -> None:
    joined = join(*tables())
    assert joined["id"].to_pylist() == ["a", "c"]
    assert joined["response"].to_pylist() == ["ra", "rc"]
    assert joined["embedding"].to_pylist() == [[97.0, 0.5], [99.0, 0.5]]


def test_join_of_nothing_is_an_error() -> None:
    queries, responses, targets = tables()
    with pytest.raises(TrainingError, match="none of 3 queries has a target"):
        join(queries, responses, targets.slice(0, 0))


def test_answers_that_end_in_a_loop_can_be_left_out() -> None:
    joined = join(*tables())
    looping = joined.set_column(joined.column_names.index("response"), "response", [["no, " * 50, "rc"]])
    assert drop_loops(looping)["id"].to_pylist() == ["c"]
    assert drop_loops(joined).equals(joined)
    with pytest.raises(TrainingError, match="drop_loops: all 1 responses"):
        drop_loops(looping.slice(0, 1))


def test_a_usable_response_without_a_target_is_an_error() -> None:
    with pytest.raises(
        TrainingError, match=r"1 queries have a usable response but no target: run embed again \(ids b\)"
    ):
        join(*tables(blank=""))


def test_a_response_longer_than_the_limit_is_an_error_unless_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    table, formatter = join(*tables()), PromptFormatter(tokenizer, "raw", 20)
    with pytest.raises(
        TrainingError,
        match=r"max_response_tokens: 2 queries .* longer than 2; the longest has 3: .* \(ids a, c\)",
    ):
        tokenize(table, formatter, tokenizer, 2)
    assert [len(ids) for ids in tokenize(table, formatter, tokenizer, 2, "cut").response_ids] == [2, 2]
    assert "2 responses are longer than max_response_tokens and lose their end" in caplog.text


def test_queries_that_are_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 1), tokenizer, 9)
    assert [len(ids) for ids in rows.query_ids] == [1, 1]
    assert "2 queries are longer than max_query_tokens and lose their end" in caplog.text
    ends = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 1, keep="end"), tokenizer, 9)
    assert tokenizer.batch_decode(ends.query_ids) == ["a", "c"]
    assert "2 queries are longer than max_query_tokens and lose their start" in caplog.text


def test_a_response_without_a_token_is_an_error() -> None:
    joined = join(*tables())
    at = joined.column_names.index("response")
    with pytest.raises(TrainingError, match=r"1 queries have a response without a token \(ids c\)"):
        tokenize(
            joined.set_column(at, "response", [["ra", ""]]),
            PromptFormatter(tiny_tokenizer(), "raw", 20),
            tiny_tokenizer(),
            9,
        )


def test_lengths_and_head() -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 20), tokenizer, 9)
    assert rows.lengths(7).tolist() == [2 + 3 + 7] * 2
    assert rows.head(1).ids == ["a"]
    assert len(rows.head(1)) == 1


@pytest.mark.parametrize(("finish", "limit", "ends"), [("stop", 10, True), ("length", 10, False), ("stop", 2, False)])
def test_eos_only_where_the_model_stopped(finish: str, limit: int, ends: bool) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables(finish)), PromptFormatter(tokenizer, "raw", 20), tokenizer, limit, "cut")
    plain = tokenizer("ra")["input_ids"]
    assert rows.response_ids[0] == ([*plain, tokenizer.eos_token_id] if ends else plain[:limit])
    assert rows.targets.dtype == np.float32
    assert rows.targets.tolist() == [[97.0, 0.5], [99.0, 0.5]]
