"""Prompts into a running Ray Data pipeline, answers out of it.

Ray Data starts and stops its engines with the data set. So one data set lives as long as the engine: its only read
task asks an actor for one chunk of prompts after the other, and waits for the next.

This code runs on other machines, where this package need not be installed: `ship` sends it there.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

# Ray Data makes floats of integers that share a column with a null, and vLLM fails on floats: hence sampling params as
# text up to the engine, and the same keys in all rows of a chunk.
ERROR = "__inference_error__"
CHUNK = pa.schema(
    [
        ("id", pa.string()),
        ("chunk", pa.int64()),
        ("tokenized_prompt", pa.list_(pa.int64())),
        ("sampling", pa.string()),
        (ERROR, pa.string()),
        ("filler", pa.binary()),
    ]
)
# Every stage of `ray.data.llm` passes a row with an error on, so it reaches no engine.
PADDING = {"id": "", "chunk": -1, "tokenized_prompt": [], ERROR: "padding", "filler": b""}
ROW_BYTES = 384
TOKEN_BYTES = 8


def block_bytes(rows: int, tokens: int) -> int:
    """Upper bound of the bytes of `rows` prompts of at most `tokens` tokens, without filler."""
    return rows * (ROW_BYTES + TOKEN_BYTES * tokens)


def chunk_table(rows: Sequence[Mapping[str, Any]], size: int, more_than_bytes: int) -> pa.Table:
    """Rows (columns `id`, `chunk`, `tokenized_prompt`, `sampling`), at least one, as a table of exactly `size`.

    Ray Data passes a batch on once it has all its rows, and a block once it exceeds the block size: without padding and
    filler the last prompts would wait for ever.
    """
    complete = [{ERROR: "", "filler": b"", **row} for row in rows]
    complete += [PADDING | {"sampling": rows[0]["sampling"]}] * (size - len(rows))
    missing = more_than_bytes + 1 - pa.Table.from_pylist(complete, schema=CHUNK).nbytes
    complete[0] = complete[0] | {"filler": bytes(max(0, missing))}
    return pa.Table.from_pylist(complete, schema=CHUNK)


class Feed:
    """An actor that keeps each chunk until it is answered, so that Ray can read it again if a machine is lost."""

    def __init__(self) -> None:
        self._chunks: dict[int, pa.Table | None] = {}
        self._changed = asyncio.Condition()

    async def put(self, number: int, chunk: pa.Table | None) -> None:
        """Add chunk `number`; None ends the data set."""
        async with self._changed:
            self._chunks[number] = chunk
            self._changed.notify_all()

    async def get(self, number: int) -> pa.Table | None:
        """Chunk `number`, once it is added; without rows after it is answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._chunks)
            return self._chunks[number]

    async def answered(self, number: int) -> None:
        """Forget the rows of a chunk."""
        self._chunks[number] = CHUNK.empty_table()


class Prompts(Datasource):  # type: ignore[misc]
    """The feed's chunks as a source of Ray Data with one read task."""

    def __init__(self, feed: Any) -> None:
        """`feed`: handle of a `Feed` actor."""
        super().__init__()
        self._feed = feed

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """The one task."""
        feed = self._feed
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: read(feed), unknown)]


def read(feed: Any) -> Iterator[pa.Table]:
    """Chunks in order until the end."""
    number = 0
    while (chunk := ray.get(feed.get.remote(number))) is not None:
        yield chunk
        number += 1


def before(row: dict[str, Any]) -> dict[str, Any]:
    """A row as `ray.data.llm` takes it."""
    del row["filler"]
    return row | {"sampling_params": json.loads(row.pop("sampling"))}


def after(row: dict[str, Any]) -> dict[str, Any]:
    """The columns to keep of an answered row; rows with an error skip this."""
    tokens = row["generated_tokens"]
    last = int(tokens[-1]) if len(tokens) else -1
    return {"id": row["id"], "chunk": row["chunk"], "text": row["generated_text"], "tokens": len(tokens), "last": last}


def ship() -> None:
    """Let Ray send this module's code to other machines by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
