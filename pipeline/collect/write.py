"""The tables of the splits and the list of removed rows, sorted by id, one bucket of texts in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.backbone.prompting import join_instruction
from pipeline.collect.decontamination import Contamination, shared_words
from pipeline.collect.near_duplicates import NearDuplicates
from pipeline.collect.rows import as_text
from pipeline.collect.spill import Mask, Spill
from pipeline.core.files import disk_errors
from pipeline.core.schemas import QUERIES, check_table

REMOVED = "removed.jsonl"


def split_tables(
    frame: pl.DataFrame, spill: Spill, labels: list[str], instructions: list[str], split: str
) -> Iterator[pa.Table]:
    """The rows of one split ("train", "heldout") in schema QUERIES, sorted by id across the tables.

    Labels and instructions are those of the sources.

    Raises ContractError if a table breaks the schema or the order. Every fate in `frame` is decided.
    """
    for rows in _sorted_rows(frame, spill, (frame["fate"] == split).to_numpy()):
        sources = pl.Series(labels, dtype=pl.String).gather(rows["source"])
        texts = rows["text"]
        if any(instructions):
            pairs = zip(rows["source"], texts, strict=True)
            joined = [join_instruction(instructions[source], text) for source, text in pairs]
            texts = pl.Series(joined, dtype=pl.String)
        columns = [rows["id"], texts, sources]
        table = pa.Table.from_arrays([column.to_arrow().cast(pa.string()) for column in columns], schema=QUERIES)
        check_table(table, QUERIES, f"the {split} split")
        yield table


def _sorted_rows(frame: pl.DataFrame, spill: Spill, chosen: Mask) -> Iterator[pl.DataFrame]:
    for numbers, texts in spill.buckets(chosen):
        rows = frame[numbers].with_columns(texts, pl.Series("row", numbers)).sort("id")
        yield rows.with_columns(pl.Series("id", [as_text(row_id) for row_id in rows["id"]], pl.String))


class Removals:
    """Why rows were removed, by row number."""

    def __init__(self) -> None:
        self._contaminated: dict[int, tuple[str, int]] = {}
        self._near: dict[int, tuple[str, float]] = {}
        self._ngram = 0

    def add_contaminated(self, found: Contamination, ngram: int) -> None:
        self._ngram = ngram
        tasks = [found.names[task] for task in found.tasks]
        pairs = zip(tasks, found.positions.tolist(), strict=True)
        self._contaminated.update(zip(found.rows.tolist(), pairs, strict=True))

    def add_near_duplicates(self, found: NearDuplicates, ids: pl.Series) -> None:
        pairs = zip(map(as_text, ids.gather(found.originals)), found.similarity.tolist(), strict=True)
        self._near.update(zip(found.rows.tolist(), pairs, strict=True))

    def write(self, path: Path, frame: pl.DataFrame, spill: Spill, labels: list[str], instructions: list[str]) -> None:
        """Write one JSON object a row, sorted by id: `id`, `source`, `text`, `reason`, and the match."""
        chosen = np.zeros(frame.height, bool)
        chosen[[*self._contaminated, *self._near]] = True
        with disk_errors(path), path.open("w", encoding="utf-8") as file:
            for rows in _sorted_rows(frame, spill, chosen):
                for row in rows.iter_rows(named=True):
                    text = join_instruction(instructions[row["source"]], row["text"])
                    line = {"id": row["id"], "source": labels[row["source"]], "text": text}
                    line |= self._reason(row["row"], row["text"])
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _reason(self, row: int, text: str) -> dict[str, Any]:
        if row in self._contaminated:
            task, position = self._contaminated[row]
            return {"reason": "contaminated", "task": task, "ngram": shared_words(text, position, self._ngram)}
        original, similarity = self._near[row]
        return {"reason": "near_duplicate", "kept": original, "similarity": round(similarity, 4)}
