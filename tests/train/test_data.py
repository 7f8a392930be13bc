"""Joining, tokenising and ordering of training rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.backbone.prompting import PromptFormatter
from pipeline.core import schemas
from pipeline.core.artifacts import Artifact, create, open_artifact
from pipeline.core.errors import TrainingError
from pipeline.train import data
from pipeline.train.data import TrainingRows, drop_loops, join, read_joined
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


Tokenize = Callable[..., TrainingRows]


@pytest.fixture(params=[1, 100], ids=["row by row", "at once"])
def tokenize(tmp_path: Path, request: pytest.FixtureRequest) -> Tokenize:
    """`data.tokenize` of a table that comes in pieces, with its files in a folder of the test."""

    def tokenize(table: pa.Table, *arguments: Any) -> TrainingRows:
        pieces = [table.slice(start, request.param) for start in range(0, table.num_rows, request.param)]
        return data.tokenize(pieces, *arguments, folder=tmp_path)

    return tokenize


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
    assert pa.concat_tables(drop_loops([looping], "train"))["id"].to_pylist() == ["c"]
    assert pa.concat_tables(drop_loops([joined], "train")).equals(joined)
    with pytest.raises(TrainingError, match="drop_loops: all 1 responses"):
        list(drop_loops([looping.slice(0, 1)], "train"))


def test_a_usable_response_without_a_target_is_an_error() -> None:
    with pytest.raises(
        TrainingError, match=r"1 queries have a usable response but no target: run embed again \(ids b\)"
    ):
        join(*tables(blank=""))


def test_a_response_longer_than_the_limit_is_an_error_unless_cut(
    tokenize: Tokenize, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    table, formatter = join(*tables()), PromptFormatter(tokenizer, "raw", 20)
    with pytest.raises(
        TrainingError,
        match=r"max_response_tokens: 2 queries .* longer than 2; the longest has 3: .* \(ids a, c\)",
    ):
        tokenize(table, formatter, tokenizer, 2)
    assert [len(ids) for ids in tokenize(table, formatter, tokenizer, 2, "cut").response_ids] == [2, 2]
    assert "2 responses are longer than max_response_tokens and lose their end" in caplog.text


def test_queries_that_are_cut_are_counted(tokenize: Tokenize, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 1), tokenizer, 9)
    assert [len(ids) for ids in rows.query_ids] == [1, 1]
    assert "2 queries are longer than max_query_tokens and lose their end" in caplog.text
    ends = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 1, keep="end"), tokenizer, 9)
    assert tokenizer.batch_decode(list(ends.query_ids)) == ["a", "c"]
    assert "2 queries are longer than max_query_tokens and lose their start" in caplog.text


def test_a_response_without_a_token_is_an_error(tokenize: Tokenize) -> None:
    joined = join(*tables())
    at = joined.column_names.index("response")
    with pytest.raises(TrainingError, match=r"1 queries have a response without a token \(ids c\)"):
        tokenize(
            joined.set_column(at, "response", [["ra", ""]]),
            PromptFormatter(tiny_tokenizer(), "raw", 20),
            tiny_tokenizer(),
            9,
        )


def test_lengths_and_head(tokenize: Tokenize) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables()), PromptFormatter(tokenizer, "raw", 20), tokenizer, 9)
    assert rows.lengths(7).tolist() == [2 + 3 + 7] * 2
    assert rows.head(1).ids == ["a"]
    assert len(rows.head(1)) == 1


@pytest.mark.parametrize(("finish", "limit", "ends"), [("stop", 10, True), ("length", 10, False), ("stop", 2, False)])
def test_eos_only_where_the_model_stopped(tokenize: Tokenize, finish: str, limit: int, ends: bool) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables(finish)), PromptFormatter(tokenizer, "raw", 20), tokenizer, limit, "cut")
    plain = tokenizer("ra")["input_ids"]
    assert rows.response_ids[0] == ([*plain, tokenizer.eos_token_id] if ends else plain[:limit])
    assert rows.targets[:].dtype == np.float32
    assert rows.targets[[1, 0]].tolist() == [[99.0, 0.5], [97.0, 0.5]]
    assert rows.batch([1]).targets.tolist() == [[99.0, 0.5]]


# --- streams --------------------------------------------------------------------------------------------------------


def artifacts(folder: Path, *parts: list[pa.Table]) -> list[Artifact]:
    """Queries, responses and targets on the disk, each in parts."""
    made = []
    for name, tables in zip(("queries", "responses", "targets"), parts, strict=True):
        with create(folder / name, kind=name, params={}) as out:
            out.write_parts(tables, tables[0].schema)
        made.append(open_artifact(folder / name, name))
    return made


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_reading_along_gives_what_joining_tables_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(data, "READ_ROWS", rows)
    queries, responses, targets = tables()
    made = artifacts(tmp_path, [queries.slice(0, 1), queries.slice(1)], [responses], [targets.slice(0, 2), targets[2:]])
    second = pa.concat_tables(read_joined(*made, "part-00001.parquet"))
    assert second.equals(join(queries.slice(1), responses, targets).select(second.column_names))
    assert next(read_joined(*made, "part-00000.parquet"))["response"].to_pylist() == ["ra"]


def test_what_is_wrong_with_a_join_is_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_ROWS", 1)
    queries, responses, targets = tables(blank="")
    made = artifacts(tmp_path / "one", [queries], [responses], [targets])
    with pytest.raises(TrainingError, match=r"1 queries have a usable response but no target.*\(ids b\)"):
        list(read_joined(*made, "part-00000.parquet"))
    made = artifacts(tmp_path / "none", [queries], [responses], [targets.slice(0, 0)])
    with pytest.raises(TrainingError, match="none of 3 queries of part-00000.parquet has a target"):
        list(read_joined(*made, "part-00000.parquet"))
