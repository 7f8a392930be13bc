"""Columns in files read as lists and arrays do."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.train.row_files import SpanRows, TextRows, TokenRows, VectorRows


def test_token_rows_are_lists(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [2**31 - 1], [4, 5]]
    column = TokenRows(tmp_path)
    assert (len(column), list(column)) == (0, [])
    column.append(rows[:1])
    assert column[0] == [1, 2, 3]
    column.append(rows[1:])
    column.append([])
    assert list(column) == rows
    assert column[1:3] == rows[1:3]
    assert column[:100] == rows
    assert column.lengths.tolist() == [3, 0, 1, 2]
    with pytest.raises(IndexError):
        column[4]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_are_read_as_float32_in_any_order(tmp_path: Path, dtype: type) -> None:
    vectors = np.arange(12).reshape(4, 3).astype(dtype) / 8
    column = VectorRows(tmp_path)
    column.append(vectors[:3])
    column.append(vectors[3:])
    assert (column.shape, len(column)) == ((4, 3), 4)
    found = column[[3, 0, 3]]
    assert found.dtype == np.float32
    assert found.tolist() == vectors[[3, 0, 3]].tolist()
    assert column[:2].tolist() == vectors[:2].tolist()
    assert column[[]].shape == (0, 3)


def test_texts_are_strings() -> None:
    column = TextRows(pa.chunked_array([["a", "b"], ["c"]]))
    assert (len(column), column[2], column[:2], list(column)) == (3, "c", ["a", "b"], ["a", "b", "c"])


def test_nothing_stays_in_the_folder(tmp_path: Path) -> None:
    column = TokenRows(tmp_path / "work")
    column.append([[1]])
    assert list((tmp_path / "work").iterdir()) == []


def test_spans_come_back_by_row() -> None:
    spans = SpanRows()
    spans.append([slice(2, 5), slice(0, 1)])
    spans.append([slice(7, 9)])
    assert list(spans) == spans[:] == [slice(2, 5), slice(0, 1), slice(7, 9)]
    spans.append([])
    assert len(spans) == 3 and spans[2] == slice(7, 9)
