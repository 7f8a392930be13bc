"""What is encoded: texts whose lengths spread as queries' do, texts of real tasks, and texts of one length."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.common import BACKBONE, REAL_DATA, text_stream
from bench.encoding.child import BATCH, WORKLOADS
from bench.lengths import log_normal, padded

MEAN, SPREAD = 30, 0.8
# A longer text is cut, by either side in its own way: different tokens would be compared.
LONGEST = 470
SUMMARIZE = "Summarize the following passage:"


@dataclass(frozen=True)
class Workload:
    """Texts that one call encodes, the instruction before each, and their lengths in tokens with the instruction."""

    instruction: str
    texts: list[str]
    tokens: list[int]

    def facts(self, new: int) -> dict[str, float]:
        """For people; `new` tokens follow each text."""
        rows = [length + new for length in self.tokens]
        order = sorted(range(len(rows)), key=lambda row: -len(self.texts[row]))
        return {
            "texts": len(rows),
            "mean tokens": round(fmean(self.tokens), 1),
            "longest": max(self.tokens),
            "padded/real": round(padded(rows, BATCH), 2),
            "sorted by characters": round(padded([rows[row] for row in order], BATCH), 2),
        }


@dataclass(frozen=True)
class Source:
    """A task's texts: the columns of a row joined by a space, the instruction before them, and how many to take."""

    path: str
    columns: tuple[str, ...]
    instruction: str
    count: int


TASKS = {
    "STSBenchmark sentences": Source(
        "hub/mteb/stsbenchmark-sts/data/test.parquet",
        ("sentence1",),
        "Generate text that is semantically similar to this text:",
        96,
    ),
    "Banking77 queries": Source(
        "hub/mteb/banking77/data/test.parquet", ("text",), "Generate the intent of this online banking query:", 96
    ),
    "SciFact documents": Source("hub/mteb/scifact/corpus/corpus.parquet", ("title", "text"), SUMMARIZE, 32),
}


class Texts:
    """Makes workloads; the same ones on each machine that has the same data."""

    def __init__(self) -> None:
        """Reads the demo's documents."""
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(BACKBONE)
        self._stream, self._at = text_stream(), 0

    def spread(self, count: int, instruction: str, orders: int = 101) -> Workload:
        """Log-normal lengths; of that many random orders the one that is padded as much as the median of them."""
        lengths = log_normal(count, MEAN, SPREAD)
        found = [np.random.default_rng(seed).permutation(lengths).tolist() for seed in range(orders)]
        return self._cut(sorted(found, key=lambda each: padded(each, BATCH))[orders // 2], instruction)

    def alike(self, count: int, length: int) -> Workload:
        """Texts of about that many tokens, no instruction."""
        return self._cut([length] * count, "")

    def tasks(self) -> dict[str, Workload]:
        """Texts of real tasks, chosen by chance, in that order; of each task whose data is there."""
        there = {name: source for name, source in TASKS.items() if (REAL_DATA / source.path).is_file()}
        return {name: self._chosen(source) for name, source in there.items()}

    def _cut(self, lengths: Sequence[int], instruction: str) -> Workload:
        return self._workload([self._take(min(length, LONGEST)) for length in lengths], instruction)

    def _take(self, count: int) -> str:
        self._at = 0 if self._at + count > len(self._stream) else self._at
        self._at += count
        return str(self._tokenizer.decode(self._stream[self._at - count : self._at])).strip()

    def _chosen(self, source: Source) -> Workload:
        import pyarrow.parquet as pq

        rows = pq.read_table(REAL_DATA / source.path, columns=list(source.columns)).to_pylist()
        order = np.random.default_rng(0).permutation(len(rows))
        texts = [" ".join(rows[row][column] for column in source.columns).strip() for row in order[: 4 * source.count]]
        found = self._workload(texts, source.instruction)
        kept = [row for row, length in enumerate(found.tokens) if length <= LONGEST][: source.count]
        return Workload(source.instruction, [texts[row] for row in kept], [found.tokens[row] for row in kept])

    def _workload(self, texts: list[str], instruction: str) -> Workload:
        inputs = [f"{instruction} {text}" if instruction else text for text in texts]
        return Workload(instruction, texts, [len(ids) for ids in self._tokenizer(inputs, verbose=False)["input_ids"]])


def save(folder: Path, workloads: Mapping[str, Workload]) -> None:
    """Write what the measured processes read."""
    content = {name: asdict(workload) for name, workload in workloads.items()}
    (folder / WORKLOADS).write_text(json.dumps(content), encoding="utf-8")
