"""Texts on disk: all come back, in order of their ids, and nothing stays behind."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from filelock import FileLock

from pipeline.collect.spill import Spill, prefixes, scratch_folder
from pipeline.core.errors import WorkError
from pipeline.core.text import query_id


def spilled(folder: Path, texts: list[str], batch: int) -> Spill:
    spill = Spill(folder)
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        ids = pl.Series([int(query_id(text), 16) for text in part], dtype=pl.UInt128)
        spill.add(np.arange(start, start + len(part)), ids, pl.Series(part))
    spill.finish()
    return spill


def test_buckets_hold_every_wanted_row_once_and_follow_the_ids(tmp_path: Path) -> None:
    texts = [f"text {index} {'é' * (index % 7)}" for index in range(1000)]
    spill = spilled(tmp_path, texts, 300)
    wanted = np.arange(1000) % 3 == 0
    found: list[tuple[int, str]] = []
    last = ""
    for rows, part in spill.buckets(wanted):
        pairs = list(zip(rows.tolist(), part.to_list(), strict=True))
        assert min(query_id(text) for _, text in pairs) > last
        last = max(query_id(text) for _, text in pairs)
        found += pairs
    assert sorted(found) == [(row, text) for row, text in enumerate(texts) if row % 3 == 0]


def test_batches_are_pieces_of_buckets(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(1000)]
    spill = spilled(tmp_path, texts, 1000)
    batches = list(spill.batches(np.ones(1000, bool), 5))
    assert max(len(rows) for rows, _ in batches) == 5
    assert {row: text for rows, part in batches for row, text in zip(rows, part, strict=True)} == dict(enumerate(texts))


def test_prefixes_are_the_first_bits_of_an_id() -> None:
    ids = pl.Series([int(text, 16) for text in ("0" * 32, "3f" + "f" * 30, "4" + "0" * 31, "f" * 32)], dtype=pl.UInt128)
    assert prefixes(ids, 4).tolist() == [0, 0, 1, 3]
    assert prefixes(ids, 256).tolist() == [0, 0x3F, 0x40, 0xFF]


def test_nothing_was_added(tmp_path: Path) -> None:
    assert list(spilled(tmp_path, [], 1).buckets(np.zeros(0, bool))) == []


def test_the_scratch_folder_goes_with_its_block_and_leftovers_go_first(tmp_path: Path) -> None:
    leftover = tmp_path / "scratch-killed"
    leftover.mkdir()
    (leftover / "00.arrow").touch()
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path) as scratch:
        assert not leftover.exists()
        (scratch / "file").touch()
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "holder.json"}


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    busy = pytest.raises(WorkError, match="is in use by another process")
    with FileLock(tmp_path / "lock"), busy, scratch_folder(tmp_path):
        pass
    with scratch_folder(tmp_path) as scratch:
        assert scratch.is_dir()
