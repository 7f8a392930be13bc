"""From raw texts to the query table: normalise, filter, de-duplicate, sample, split.

A query's id is a hash of its normalised text. Whether it is sampled and which split it is in follow from its id and
the seed alone, never from its position: a corpus that grows moves no query from one split to the other.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import polars as pl
import pyarrow as pa
from pydantic import Field

from pipeline.contracts import QUERIES
from pipeline.params import Params
from pipeline.sources import Source

SPLITS = ("train", "heldout")
FATES = ("empty", "too_short", "too_long", "too_many_tokens", "duplicate", "sampled_out", *SPLITS)

TokenCounter = Callable[[Sequence[str]], Sequence[int]]


class CollectParams(Params):
    """Which queries to learn from."""

    local_dir: str = Field(description="relative source paths start here")
    sources: list[Source] = Field(min_length=1)
    min_chars: int = Field(default=2, ge=1)
    max_chars: int = Field(default=8000, ge=1)
    max_tokens: int | None = Field(default=512, ge=1, description="backbone tokens; null: no limit")
    sample: int | None = Field(default=None, ge=1, description="rows to keep, by content hash; null: all")
    heldout_fraction: float = Field(default=0.01, gt=0, lt=1)
    seed: int = 0


# Surrogates are no characters; tabs and line ends are whitespace, all other control characters are noise.
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_INNER_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")
_INDENT_SPACE = re.compile(r"[^\S\t]")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize_text(text: str) -> str:
    """The one form in which the pipeline sees a text: Unicode NFC with tidy whitespace, always encodable as UTF-8.

    Surrogate pairs become their character; lone surrogates and control characters go. Every kind of line end becomes
    a newline, more than one blank line becomes one, a run of spaces within a line becomes one space; indentation
    stays (code), spaces at the ends of lines and of the text go. Nothing else changes; applying it twice changes
    nothing more.
    """
    if _SURROGATES.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", text))
    tidy = "\n".join(_tidy_line(line) for line in text.splitlines())
    return _BLANK_LINES.sub("\n\n", tidy).strip()


def _tidy_line(line: str) -> str:
    body = line.strip()
    indent = line[: len(line) - len(line.lstrip())] if body else ""
    return _INDENT_SPACE.sub(" ", indent) + _INNER_SPACE.sub(" ", body)


def query_id(text: str) -> str:
    """Content id of a normalised text: 32 hex characters of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def to_frame(texts: Iterable[tuple[str, str]]) -> pl.DataFrame:
    """Raw `(source, text)` rows as a frame of `source`, normalised `text` and its `id`, in their order."""
    rows = [(source, normalize_text(text)) for source, text in texts]
    return pl.DataFrame(
        {
            "source": [source for source, _ in rows],
            "text": [text for _, text in rows],
            "id": [query_id(text) for _, text in rows],
        },
        schema={"source": pl.String, "text": pl.String, "id": pl.String},
    )


def drop_lengths(frame: pl.DataFrame, *, min_chars: int, max_chars: int) -> pl.DataFrame:
    """With a column `fate`: null, or why a row is left out by its characters or as a repetition of an earlier one."""
    chars = pl.col("text").str.len_chars()
    return frame.with_columns(
        fate=pl.when(chars == 0)
        .then(pl.lit("empty"))
        .when(chars < min_chars)
        .then(pl.lit("too_short"))
        .when(chars > max_chars)
        .then(pl.lit("too_long"))
        .when(~pl.col("id").is_first_distinct())
        .then(pl.lit("duplicate"))
    )


def drop_token_lengths(frame: pl.DataFrame, *, max_tokens: int, count_tokens: TokenCounter) -> pl.DataFrame:
    """Leave out texts of more than `max_tokens` tokens; only texts not left out yet are counted."""
    left = _undecided(frame)
    counts = pl.Series("tokens", list(count_tokens(left["text"].to_list())), dtype=pl.Int64)
    return _set_fate(frame, left.filter(counts > max_tokens)["id"], "too_many_tokens")


def sample(frame: pl.DataFrame, *, rows: int, seed: int) -> pl.DataFrame:
    """Leave out all but the `rows` rows whose keyed hashes are smallest."""
    ranked = _keyed(_undecided(frame), seed, "sample").sort("key", "id")
    return _set_fate(frame, ranked["id"][rows:], "sampled_out")


def split(frame: pl.DataFrame, *, heldout_fraction: float, seed: int) -> pl.DataFrame:
    """Give each row that is left its split."""
    keyed = _keyed(_undecided(frame), seed, "split")
    frame = _set_fate(frame, keyed.filter(pl.col("key") < heldout_fraction)["id"], "heldout")
    return frame.with_columns(pl.col("fate").fill_null("train"))


def _undecided(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("fate").is_null())


def _set_fate(frame: pl.DataFrame, ids: pl.Series, fate: str) -> pl.DataFrame:
    chosen = pl.when(pl.col("id").is_in(ids.implode())).then(pl.lit(fate))
    return frame.with_columns(fate=pl.coalesce("fate", chosen))


def _keyed(frame: pl.DataFrame, seed: int, purpose: str) -> pl.DataFrame:
    """With a column `key`: a number in [0, 1) that depends on the id, the seed and the purpose only."""
    keys = [_unit_hash(f"{seed}:{purpose}:{row_id}") for row_id in frame["id"]]
    return frame.with_columns(pl.Series("key", keys, dtype=pl.Float64))


def _unit_hash(text: str) -> float:
    # 53 bits: every such integer is exact as a float, and the quotient stays below 1.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) // 2**11 / 2**53


def count_fates(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Rows of each fate, in all and per source, beside the number of rows `read`."""
    counts = {name: {"read": 0} | dict.fromkeys(FATES, 0) for name in ("all", *frame["source"].unique())}
    for source, fate, rows in frame.group_by("source", "fate").len().iter_rows():
        for name in ("all", source):
            counts[name][fate] += rows
            counts[name]["read"] += rows
    return counts


def split_table(frame: pl.DataFrame, name: str) -> pa.Table:
    """The rows of one split under the QUERIES contract, sorted by id."""
    rows = frame.filter(pl.col("fate") == name).sort("id").select(QUERIES.names)
    return pa.Table.from_pydict(rows.to_dict(as_series=False), schema=QUERIES)
