"""Whatever is added, in whatever pieces, between whatever ends: the store gives each committed row back as it was."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import row_store
from pipeline.core.row_store import ShardStore

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string())])

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
rows = st.dictionaries(st.text("0123456789abcdef", min_size=1, max_size=6), st.none() | texts, max_size=24)
# After each row or table: go on, commit, end the process well, or have it die.
ends = st.lists(st.sampled_from(["on", "on", "flush", "close", "die"]), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows, ends, st.integers(1, 5), st.booleans())
def test_committed_rows_come_back_as_they_were(
    wanted: dict[str, str | None], after: list[str], flush_rows: int, as_tables: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.object(row_store, "COMPACT_ABOVE", 2):

        def opened() -> ShardStore:
            return ShardStore(Path(folder), SCHEMA, {"of": "texts"}, flush_rows=flush_rows, flush_seconds=3600)

        store, pending, committed = opened(), set[str](), set[str]()
        for (row_id, text), end in zip(wanted.items(), after, strict=False):
            row = {"id": row_id, "text": text}
            store.add_table(pa.Table.from_pylist([row], SCHEMA)) if as_tables else store.add(row)
            pending.add(row_id)
            if end == "flush" or len(pending) >= flush_rows:
                store.flush()
            if end == "close":
                store.__exit__(None, None, None)
            if end in ("flush", "close") or len(pending) >= flush_rows:
                committed |= pending
                pending.clear()
            if end in ("close", "die"):
                store._lock.release()  # as the death of the process does
                store, pending = opened(), set()
            assert set(store) >= committed
        store.flush()
        committed |= pending
        assert set(store) == committed
        order = sorted(committed, key=lambda row_id: row_id[::-1])
        assert store.take(order).to_pylist() == [{"id": row_id, "text": wanted[row_id]} for row_id in order]
        store._lock.release()
        again = opened()
        assert set(again) == committed and len(again) == len(committed)
        again._lock.release()
