"""What is counted of targets that pass by."""

import pyarrow as pa
import pytest

from pipeline.embed.statistics import TargetStatistics
from pipeline.embed.targets import store_schema


def row(row_id: str, embedding: list[float], tokens: int, truncated: bool = False) -> dict[str, object]:
    return {"id": row_id, "embedding": embedding, "tokens": tokens, "truncated": truncated}


def test_statistics_over_all_tables() -> None:
    schema = store_schema(2, "float16")
    tables = [
        pa.Table.from_pylist([row("a", [3.0, 4.0], 5), row("c", [3.0, 4.0], 9, truncated=True)], schema=schema),
        pa.Table.from_pylist([row("d", [0.0, 1.0], 1), row("e", [0.0, 1.0], 4)], schema=schema),
        schema.empty_table(),
    ]
    statistics = TargetStatistics()
    assert [table.num_rows for table in statistics.through(tables)] == [2, 2, 0]
    assert statistics.norms() == {"norm_mean": 3.0, "norm_std": 2.0}
    assert statistics.anisotropy.value == pytest.approx((1 + 1 + 4 * 0.8) / 6, abs=1e-6)
    assert (statistics.rows, statistics.truncated) == (4, 1)
    assert statistics.tokens.summary() == {"0": 0, "1": 1, "2-3": 0, "4-7": 2, "8-15": 1}


def test_lengths_of_large_float16_targets_do_not_overflow() -> None:
    schema = store_schema(2, "float16")
    statistics = TargetStatistics()
    list(statistics.through([pa.Table.from_pylist([row("a", [30000.0, 40000.0], 1)], schema=schema)]))
    assert statistics.norms() == {"norm_mean": 50000.0, "norm_std": 0.0}


def test_nothing_counted_yet() -> None:
    assert TargetStatistics().norms() == {"norm_mean": 0.0, "norm_std": 0.0}
    assert TargetStatistics().tokens.summary() == {}
    assert TargetStatistics().anisotropy.value is None
