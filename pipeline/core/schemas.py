"""The tables that stages exchange. Column names are fixed: users and tools rely on them.

| artifact                              | rows                  | key  |
|---------------------------------------|-----------------------|------|
| data/queries/{train,heldout}.parquet  | one a query           | `id` |
| data/responses/*.parquet              | one a query           | `id` |
| data/targets/*.parquet                | one a usable response | `id` |

Responses may have the column `SAMPLES` too, targets `QUERY_EMBEDDING` where `embed.queries` asks for it. Next to the
queries, `removed.jsonl` lists near duplicates and contaminated queries that were left out, and why.
Every table is sorted by `id` across its files, and an id occurs once.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import ContractError

FinishReason = Literal["stop", "length", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "error")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


QUERIES = pa.schema([_required("id", pa.string()), _required("text", pa.string()), _required("source", pa.string())])

RESPONSES = pa.schema(
    [
        _required("id", pa.string()),
        _required("response", pa.string()),
        _required("finish_reason", pa.string()),
        _required("prompt_tokens", pa.int32()),
        _required("response_tokens", pa.int32()),
        pa.field("error", pa.string()),  # why, where finish_reason is "error"
    ]
)

# Behind the others where `generate.samples_per_query` asks for several answers: the usable ones besides `response`.
SAMPLES = pa.field("samples", pa.list_(_required("item", pa.string())), nullable=False)


def responses_schema(samples: int) -> pa.Schema:
    """Of the responses with so many answers a query."""
    return RESPONSES if samples == 1 else RESPONSES.append(SAMPLES)


def samples_of(params: Mapping[str, Any]) -> int:
    """Answers a query of responses whose manifest has these params."""
    return int(params.get("generate", {}).get("samples_per_query", 1))


TARGET_TYPES = {"float16": pa.float16(), "float32": pa.float32()}
QUERY_EMBEDDING = "query_embedding"  # the column of the queries' own embeddings, where the teacher gave them


def targets_schema(width: int, dtype: str, *, queries: bool = False) -> pa.Schema:
    """Targets of `width` dimensions stored as `dtype` ("float16" or "float32"), with those of the queries if asked."""
    vector = pa.list_(_required("item", TARGET_TYPES[dtype]), width)
    columns = ["embedding", QUERY_EMBEDDING] if queries else ["embedding"]
    return pa.schema([_required("id", pa.string()), *(_required(name, vector) for name in columns)])


def check_table(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table; raises ContractError unless it has the schema, required columns without nulls, sorted unique ids."""
    if not table.schema.equals(schema):
        raise ContractError(f"{where}: schema is\n{table.schema}\nbut must be\n{schema}")
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ContractError(f"{where}: column '{field.name}' has {table.column(field.name).null_count} nulls")
    check_ids(table.column("id"), where)
    return table


def check_ids(ids: pa.ChunkedArray, where: str) -> None:
    """Raises ContractError unless ids are strictly increasing (so sorted and unique)."""
    if len(ids) < 2:
        return
    ids = ids.combine_chunks()
    ordered = pc.less(ids[:-1], ids[1:])
    if not pc.all(ordered).as_py():
        at = pc.index(ordered, False).as_py()
        first, second = ids[at].as_py(), ids[at + 1].as_py()
        what = f"id {first} occurs twice" if first == second else f"id {second} comes after {first}: not sorted"
        raise ContractError(f"{where}: {what}")
