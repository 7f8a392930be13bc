"""Batches of real text whose lengths spread as queries and answers do."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.lengths import chunks, log_normal, padded


@dataclass(frozen=True)
class Distribution:
    """Log-normal lengths in tokens, cut at `bench.lengths.LIMIT`, with these means.

    Answers: a spread of 0.6 makes the longest of 32 rows 2.6 times the mean.
    """

    batch: int
    query_mean: int
    response_mean: int
    query_spread: float = 0.8
    response_spread: float = 0.6


DISTRIBUTIONS = {"standard": Distribution(4, 57, 173), "short": Distribution(8, 30, 60)}


@dataclass(frozen=True)
class Rows:
    """Token ids of one batch; responses end with EOS."""

    query_ids: list[list[int]]
    response_ids: list[list[int]]

    @property
    def tokens(self) -> int:
        """Real tokens of both passes, new tokens not counted."""
        return sum(map(len, self.query_ids)) + sum(map(len, self.response_ids))


@dataclass(frozen=True)
class Lengths:
    """Token counts of rows."""

    queries: list[int]
    responses: list[int]

    def padded(self, batch: int) -> float:
        """How many times the real response tokens the padded batches hold."""
        return padded(self.responses, batch)

    def facts(self, batch: int) -> dict[str, float]:
        """Means, longest, and how many times the real tokens a padded batch holds."""
        return {
            "mean query": round(fmean(self.queries), 1),
            "longest query": max(self.queries),
            "mean response": round(fmean(self.responses), 1),
            "longest response": max(self.responses),
            "padded/real response": round(self.padded(batch), 2),
        }


def lengths(distribution: Distribution, batches: int, orders: int = 101) -> Lengths:
    """Lengths at evenly spaced quantiles, so that few rows hold the tail too.

    Of that many random orders, the one whose batches are padded as much as the median of them.
    """
    count = batches * distribution.batch
    queries = log_normal(count, distribution.query_mean, distribution.query_spread)
    responses = log_normal(count, distribution.response_mean, distribution.response_spread)
    drawn = [np.random.default_rng(seed) for seed in range(orders)]
    found = [Lengths(random.permutation(queries).tolist(), random.permutation(responses).tolist()) for random in drawn]
    return sorted(found, key=lambda each: each.padded(distribution.batch))[orders // 2]


def make_batches(found: Lengths, batch: int, stream: Sequence[int], end: int) -> list[Rows]:
    """Consecutive pieces of a stream of token ids with these lengths; the last token of a response is `end`."""
    at = 0

    def take(count: int) -> list[int]:
        nonlocal at
        at = 0 if at + count > len(stream) else at
        at += count
        return list(stream[at - count : at])

    pairs = zip(chunks(found.queries, batch), chunks(found.responses, batch), strict=True)
    return [Rows([take(n) for n in queries], [[*take(n - 1), end] for n in responses]) for queries, responses in pairs]


def save(path: Path, batches: Sequence[Rows]) -> None:
    """Write batches as JSON."""
    path.write_text(json.dumps([asdict(batch) for batch in batches]), encoding="utf-8")


def load(path: Path) -> list[Rows]:
    """Read what `save` wrote."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Rows(**batch) for batch in found]
