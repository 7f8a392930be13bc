"""The tables' contracts: exact schema, no nulls, ids sorted and unique."""

import pyarrow as pa
import pytest

from pipeline.core.errors import ContractError
from pipeline.core.schemas import QUERIES, RESPONSES, check_ids, check_table, targets_schema


def queries(ids: list[str]) -> pa.Table:
    return pa.Table.from_pylist([{"id": row, "text": "t", "source": "s"} for row in ids], schema=QUERIES)


@pytest.mark.parametrize("ids", [[], ["a"], ["a", "b", "c"]])
def test_sorted_unique_ids_pass(ids: list[str]) -> None:
    check_table(queries(ids), QUERIES, "here")


def test_a_duplicate_id_is_named_with_its_place() -> None:
    with pytest.raises(ContractError, match=r"data/queries/train.parquet: id b occurs twice"):
        check_table(queries(["a", "b", "b", "c"]), QUERIES, "data/queries/train.parquet")


def test_unsorted_ids_are_named() -> None:
    with pytest.raises(ContractError, match="id a comes after b: not sorted"):
        check_table(queries(["b", "a"]), QUERIES, "here")


def test_order_holds_across_chunks() -> None:
    check_ids(pa.chunked_array([["a"], [], ["b"]], pa.string()), "here")
    with pytest.raises(ContractError, match="id b occurs twice"):
        check_ids(pa.chunked_array([["a", "b"], ["b"]]), "here")


def test_another_schema_shows_both() -> None:
    table = pa.table({"id": ["a"], "text": ["t"]})
    with pytest.raises(ContractError, match=r"here: schema is\n(.|\n)*but must be\n(.|\n)*source"):
        check_table(table, QUERIES, "here")


def test_a_null_in_a_required_column_is_counted() -> None:
    columns = [pa.array(["a", "b"]), pa.array(["t", None]), pa.array(["s", "s"])]
    with pytest.raises(ContractError, match="column 'text' has 1 nulls"):
        check_table(pa.Table.from_arrays(columns, schema=QUERIES), QUERIES, "here")


def test_the_error_of_a_response_may_be_null() -> None:
    row = {"id": "a", "response": "r", "finish_reason": "stop", "prompt_tokens": 1, "response_tokens": 1, "error": None}
    check_table(pa.Table.from_pylist([row], schema=RESPONSES), RESPONSES, "here")


@pytest.mark.parametrize(("dtype", "kind"), [("float16", pa.float16()), ("float32", pa.float32())])
def test_targets_have_one_width_and_one_type(dtype: str, kind: pa.DataType) -> None:
    embedding = targets_schema(3, dtype).field("embedding").type
    assert (embedding.list_size, embedding.value_type) == (3, kind)
    table = pa.Table.from_pylist([{"id": "a", "embedding": [0.0, 1.0, 2.0]}], schema=targets_schema(3, "float32"))
    with pytest.raises(ContractError, match="schema is"):
        check_table(table, targets_schema(4, "float32"), "here")
