"""The fate of each text: filtered, duplicate, sampled out, or in a split.

A query's id is a hash of its normalised text, its source's instruction included. Sampling and split depend on the id
and the seed alone: a growing corpus moves no query from one split to the other. The frames have one row a text, in
reading order, without the text itself: `source` (its number), `id` (as a number, a third of its bytes as text), and
`fate`, null while undecided: 19 bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import polars as pl

from pipeline.backbone.prompting import join_instruction
from pipeline.collect.spill import Mask, Rows, prefixes
from pipeline.core.readers import HubSource, LocalSource
from pipeline.core.text import normalize_text, query_id

SPLITS = ("train", "heldout")
FATES = (
    "empty",
    "too_short",
    "too_long",
    "too_many_tokens",
    "duplicate",
    "other_language",
    "contaminated",
    "near_duplicate",
    "sampled_out",
    *SPLITS,
)
FATE = pl.Enum(FATES)
ALL = "all"  # sources together, in counts
_DUPLICATE_PARTS = 16  # of the ids, in which repeated ones are looked for one after another


def to_frame(source: int, texts: Sequence[str], instruction: str = "") -> pl.DataFrame:
    """Raw texts of a source as a frame with the normalised `text`, and the id of it behind the `instruction`."""
    normal = [normalize_text(text) for text in texts]
    columns = {
        "source": [source] * len(normal),
        "text": normal,
        "id": (int(query_id(join_instruction(instruction, text)), 16) for text in normal),
        "fate": [None] * len(normal),
    }
    return pl.DataFrame(columns, schema={"source": pl.UInt16, "text": pl.String, "id": pl.UInt128, "fate": FATE})


def as_text(row_id: int) -> str:
    """An id of a frame as files have it: 32 hex characters."""
    return f"{row_id:032x}"


def drop_lengths(frame: pl.DataFrame, *, min_chars: int, max_chars: int) -> pl.DataFrame:
    """Drop rows by the number of characters of their `text`."""
    chars = pl.col("text").str.len_chars()
    limits = {"empty": chars == 0, "too_short": chars < min_chars, "too_long": chars > max_chars}
    reasons = [pl.when(applies).then(pl.lit(fate, FATE)) for fate, applies in limits.items()]
    return frame.with_columns(fate=pl.coalesce("fate", *reasons))


def drop_duplicates(frame: pl.DataFrame) -> pl.DataFrame:
    """Drop each row whose id an earlier row has."""
    ids, parts = frame["id"], prefixes(frame["id"], _DUPLICATE_PARTS)
    repeated = [np.zeros(0, np.int64)]
    for part in range(_DUPLICATE_PARTS):
        rows = np.flatnonzero(parts == part)
        repeated.append(rows[~ids.gather(rows).is_first_distinct().to_numpy()])
    return set_fate(frame, np.concatenate(repeated), "duplicate")


def undecided(frame: pl.DataFrame) -> Mask:
    """Which rows have no fate yet: bool [rows]."""
    return frame["fate"].is_null().to_numpy()


def set_fate(frame: pl.DataFrame, rows: Sequence[int] | Rows, fate: str) -> pl.DataFrame:
    """Set the fate of rows, by number, that have none yet."""
    chosen = np.zeros(frame.height, bool)
    chosen[rows] = True
    return frame.with_columns(fate=pl.coalesce("fate", pl.when(pl.Series(chosen)).then(pl.lit(fate, FATE))))


def sample(frame: pl.DataFrame, *, rows: int, seed: int, weights: Sequence[float] | None = None) -> pl.DataFrame:
    """Drop all but the `rows` rows with the smallest keyed hashes.

    With `weights`, each source's share of `rows` is proportional to its weight; the share that a source cannot fill
    goes to the others.
    """
    ranked = _keyed(frame, seed, "sample").sort("key", "id")
    if weights is None:
        return set_fate(frame, ranked["row"].to_numpy()[rows:], "sampled_out")
    sources = ranked["source"].to_numpy()
    shares = allot(rows, weights, np.bincount(sources, minlength=len(weights)).tolist())
    rest = [ranked["row"].to_numpy()[sources == source][share:] for source, share in enumerate(shares)]
    return set_fate(frame, np.concatenate(rest), "sampled_out")


def allot(rows: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Rows of each source: in proportion to the weights, at most what is available; fractions round by the largest."""
    open_ = {source for source, count in enumerate(available) if count}
    shares = {source: Fraction(0) for source in range(len(available))}
    left = Fraction(rows)
    while open_:
        unit = left / sum(Fraction(weights[source]) for source in open_)
        full = {source for source in open_ if available[source] <= unit * Fraction(weights[source])}
        if not full:
            shares |= {source: unit * Fraction(weights[source]) for source in open_}
            break
        shares |= {source: Fraction(available[source]) for source in full}
        left -= sum(available[source] for source in full)
        open_ -= full
    counts = [int(shares[source]) for source in range(len(available))]
    missing = min(rows, sum(available)) - sum(counts)
    by_fraction = sorted(range(len(counts)), key=lambda source: (counts[source] - shares[source], source))
    for source in by_fraction[:missing]:
        counts[source] += 1
    return counts


def split(frame: pl.DataFrame, *, heldout_fraction: float, seed: int) -> pl.DataFrame:
    """Give each undecided row its split; the fate of every row is then decided."""
    keyed = _keyed(frame, seed, "split")
    heldout = keyed.filter(pl.col("key") < heldout_fraction)["row"].to_numpy()
    return set_fate(frame, heldout, "heldout").with_columns(pl.col("fate").fill_null(pl.lit("train", FATE)))


def _keyed(frame: pl.DataFrame, seed: int, purpose: str) -> pl.DataFrame:
    """The undecided rows with their number `row` and a `key` in [0, 1) that depends on id, seed and purpose only."""
    left = frame.with_row_index("row").filter(pl.col("fate").is_null())
    texts = (f"{seed}:{purpose}:{as_text(row_id)}" for row_id in left["id"])
    keys = np.fromiter(map(_unit_hash, texts), float, left.height)
    return left.with_columns(pl.Series("key", keys))


def _unit_hash(text: str) -> float:
    # 53 bits: every such integer is exact as a float, and the quotient stays below 1.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) // 2**11 / 2**53


def source_labels(sources: Sequence[LocalSource | HubSource]) -> list[str]:
    """What names each source in counts and in the column `source`; equal names get the number of the source."""
    labels = [source.label for source in sources]
    named = Counter([ALL, *labels])
    return [f"{label} (sources.{number})" if named[label] > 1 else label for number, label in enumerate(labels)]


def count_fates(frame: pl.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows `read` and rows of each fate, in all and per source; `labels` name the sources."""
    counts = {name: {"read": 0} | dict.fromkeys(FATES, 0) for name in (ALL, *labels)}
    for source, fate, rows in frame.group_by("source", "fate").len().iter_rows():
        for name in (ALL, labels[source]):
            counts[name][fate] += rows
            counts[name]["read"] += rows
    return counts
