"""The ids of several sorted tables in one order."""

import random
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core import sorted_ids
from pipeline.core.artifacts import Artifact, create, open_artifact
from pipeline.core.errors import ContractError

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])


def artifact(folder: Path, *tables: list[str]) -> Artifact:
    with create(folder / "queries", kind="queries", params={}) as out:
        for number, ids in enumerate(tables):
            out.write_table(f"{number}.parquet", pa.table({"id": ids}, SCHEMA))
    return open_artifact(folder / "queries", "queries")


def merged(made: Artifact) -> list[str]:
    return [row_id for piece in sorted_ids.sorted_ids(made) for row_id in piece.to_pylist()]


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_tables_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(sorted_ids, "READ_ROWS", rows)
    draw = random.Random(rows)
    ids = [f"{number:03d}" for number in draw.sample(range(1000), 60)]
    made = artifact(tmp_path, sorted(ids[:3]), sorted(ids[3:50]), [], sorted(ids[50:]))
    assert merged(made) == sorted(ids)


def test_no_rows_have_no_ids(tmp_path: Path) -> None:
    assert merged(artifact(tmp_path, [], [])) == []


@pytest.mark.parametrize("tables", [(["a", "c"], ["b", "c"]), (["a", "a"],), (["a", "c", "b"],)])
@pytest.mark.parametrize("rows", [1, 100])
def test_an_id_that_occurs_twice_or_out_of_order_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: tuple[list[str], ...], rows: int
) -> None:
    monkeypatch.setattr(sorted_ids, "READ_ROWS", rows)
    with pytest.raises(ContractError, match="occurs twice|not sorted"):
        merged(artifact(tmp_path, *tables))


def test_pieces_have_their_size_and_the_last_is_shorter() -> None:
    arrays = [pa.array(list(text), pa.string()) for text in ("ab", "cdefg", "", "h")]
    assert ["".join(piece.to_pylist()) for piece in sorted_ids.pieces(arrays, 3)] == ["abc", "def", "gh"]
    assert list(sorted_ids.pieces([], 3)) == []
