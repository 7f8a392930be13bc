"""Several sampled answers to a query: each is a row of its own until the responses are written.

The first sample has the query's id, and so the seed and the row that it has where one answer is asked for; the others
have an id behind it, so that they follow it in every order of ids, and a seed of their own.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.core.schemas import SAMPLES

_MARK = "."


def sampled_ids(ids: pa.Array, samples: int) -> pa.Array:
    """The ids of all samples of the queries `ids`, sorted if these are."""
    if samples == 1:
        return ids
    return pa.array([_sample_id(row_id, number) for row_id in ids.to_pylist() for number in range(samples)], ids.type)


def sampled_rows(table: pa.Table, samples: int) -> pa.Table:
    """The rows (`id`, `text`), each once a sample."""
    if samples == 1:
        return table
    repeated = table.take(pa.array(np.repeat(np.arange(table.num_rows), samples)))
    ids = sampled_ids(table["id"].combine_chunks(), samples)
    return repeated.set_column(table.schema.get_field_index("id"), "id", ids)


def _sample_id(row_id: str, number: int) -> str:
    return f"{row_id}{_MARK}{number:02d}" if number else row_id


def is_first(row_id: str) -> bool:
    """Whether a row is the first sample of its query."""
    return _MARK not in row_id


def gathered(tables: Iterable[pa.Table], samples: int) -> Iterator[pa.Table]:
    """One row a query of tables with whole queries, sorted by id: its first usable sample, the others in `SAMPLES`.

    A sample is usable if it did not fail and is not blank. Without one the first stands for its query.
    """
    return (_gathered(table, samples) for table in tables) if samples > 1 else iter(tables)


def _gathered(table: pa.Table, samples: int) -> pa.Table:
    texts, reasons = table["response"].to_pylist(), table["finish_reason"].to_pylist()
    starts = range(0, table.num_rows, samples)
    chosen, others = [], []
    for start in starts:
        usable = [at for at in range(start, start + samples) if reasons[at] != "error" and texts[at].strip()]
        first, *rest = usable or [start]
        chosen.append(first)
        others.append([texts[at] for at in rest])
    found = table.take(pa.array(chosen, pa.int64()))
    ids = table["id"].take(pa.array(starts, pa.int64()))
    named = found.set_column(table.schema.get_field_index("id"), table.schema.field("id"), ids)
    return named.append_column(SAMPLES, pa.array(others, SAMPLES.type))
