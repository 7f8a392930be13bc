"""Texts per second of a teacher: the project's length-sorted chunks beside batches of 32 in the order of the texts.

    .venv/bin/python bench/embed.py [--texts 1024] [--rounds 3]

The same model (all-MiniLM-L6-v2, fp32), the same texts, the same batch size, in one process, alternating. The texts
are passages of the demo's documents cut to lengths that spread like answers of a language model: log-normal, median
60 words, from 1 to 350. The embeddings of both sides are compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.common import ROOT, TEACHER, prepare_models, show

BATCH = 32
MEDIAN_WORDS, SPREAD, MOST_WORDS = 60, 0.9, 350


def texts(count: int) -> list[str]:
    """Passages of log-normal lengths in random order."""
    words = [word for path in sorted((ROOT / "data/demo/tasks").rglob("*.jsonl")) for word in _words(path)]
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEDIAN_WORDS), SPREAD, count), 1, MOST_WORDS).astype(int)
    starts = random.integers(0, len(words) - MOST_WORDS, count)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def _words(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [word for row in rows for word in str(row.get("text", "")).split()]


def main() -> None:
    """Alternate between the two orders and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    prepare_models()
    from pipeline.embed.targets import CHUNK_BATCHES
    from pipeline.embed.teachers.sentence_transformers import SentenceTransformersTeacher

    teacher = SentenceTransformersTeacher(
        str(TEACHER), revision=None, max_tokens=256, dtype="float32", batch_size=BATCH
    )
    rows = texts(arguments.texts)

    def in_chunks(size: int) -> "np.ndarray[Any, Any]":
        return np.concatenate([teacher.embed(rows[start : start + size]) for start in range(0, len(rows), size)])

    sides: dict[str, Callable[[], Any]] = {
        "sorted": lambda: in_chunks(BATCH * CHUNK_BATCHES),
        "unsorted": lambda: in_chunks(BATCH),
    }
    in_chunks(BATCH)  # the first call pays for memory
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vectors = {}
    for _ in range(arguments.rounds):
        for side, embed in sides.items():
            started = time.monotonic()
            vectors[side] = embed()
            seconds[side].append(time.monotonic() - started)
    rate = {side: len(rows) / statistics.median(each) for side, each in seconds.items()}
    table = [
        {"side": side, "texts/s": round(value, 1), "seconds": str([round(s, 1) for s in seconds[side]])}
        for side, value in rate.items()
    ]
    difference = float(np.abs(vectors["sorted"] - vectors["unsorted"]).max())
    result = {
        "speedup": round(rate["sorted"] / rate["unsorted"], 2),
        "sorted_texts_per_s": round(rate["sorted"], 1),
        "unsorted_texts_per_s": round(rate["unsorted"], 1),
        "largest_difference": difference,
    }
    show(f"{len(rows)} texts, all-MiniLM-L6-v2, batches of {BATCH}", table, result)


if __name__ == "__main__":
    main()
