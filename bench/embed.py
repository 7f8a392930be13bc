"""Tokens that a teacher computes for its texts: batches of tokens beside batches of 32 texts, both sorted by length.

    .venv/bin/python bench/embed.py [--texts 1024] [--rounds 3]

The same model (all-MiniLM-L6-v2, fp32), the same texts, the same chunks, in one process, alternating; counted are the
tokens of all passes with and without padding, and the processor's seconds. The texts are passages of the demo's
documents cut to lengths that spread like answers of a language model: log-normal, median 60 words, from 1 to 350. The
embeddings of both sides are compared.
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
CHUNK = 512
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


class Meter:
    """Passes, tokens and padded tokens that a sentence-transformers model reads."""

    def __init__(self, model: Any) -> None:
        self.passes = self.tokens = self.padded = 0
        model[0].register_forward_pre_hook(self._count)

    def _count(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.passes += 1
        self.padded += arguments[0]["input_ids"].numel()
        self.tokens += int(arguments[0]["attention_mask"].sum())

    def take(self) -> tuple[int, int, int]:
        """Since the last call."""
        taken = self.passes, self.tokens, self.padded
        self.passes = self.tokens = self.padded = 0
        return taken


def main() -> None:
    """Alternate between the two ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=None)
    arguments = parser.parse_args()
    prepare_models()
    from pipeline.embed.teachers.sentence_transformers import SentenceTransformersTeacher

    teacher = SentenceTransformersTeacher(
        str(TEACHER), revision=None, max_tokens=256, dtype="float32", batch_tokens=arguments.batch_tokens
    )
    model, rows = teacher._model, texts(arguments.texts)
    meter = Meter(model)
    sides: dict[str, Callable[[list[str]], Any]] = {
        "tokens": teacher.embed,
        "texts": lambda some: model.encode(some, batch_size=BATCH, show_progress_bar=False),
    }

    def in_chunks(embed: Callable[[list[str]], Any]) -> "np.ndarray[Any, Any]":
        return np.concatenate([embed(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)])

    in_chunks(teacher.embed)  # the first call pays for memory
    meter.take()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vectors, counts = {}, {}
    for _ in range(arguments.rounds):
        for side, embed in sides.items():
            started = time.process_time()
            vectors[side] = in_chunks(embed)
            seconds[side].append(time.process_time() - started)
            counts[side] = meter.take()
    table = [
        {
            "batches of": side,
            "passes": passes,
            "tokens": tokens,
            "padded / tokens": round(padded / tokens, 3),
            "processor seconds": str([round(each, 2) for each in seconds[side]]),
        }
        for side, (passes, tokens, padded) in counts.items()
    ]
    median = {side: statistics.median(each) for side, each in seconds.items()}
    result = {
        "padding_by_tokens": round(counts["tokens"][2] / counts["tokens"][1], 3),
        "padding_by_texts": round(counts["texts"][2] / counts["texts"][1], 3),
        "processor_seconds_saved": round(1 - median["tokens"] / median["texts"], 3),
        "largest_difference": float(np.abs(vectors["tokens"] - vectors["texts"]).max()),
    }
    show(f"{len(rows)} texts, all-MiniLM-L6-v2", table, result)


if __name__ == "__main__":
    main()
