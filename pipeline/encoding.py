"""Texts in, embeddings out, as files: `python -m pipeline encode --model DIR --input FILE --output OUT`."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.artifacts import write_bytes
from pipeline.errors import SourceError
from pipeline.queries import normalize_text

if TYPE_CHECKING:
    import numpy as np

OUTPUTS = (".npy", ".parquet")
DEFAULT_COLUMN = "text"


def read_texts(path: Path, column: str | None) -> list[str]:
    """The texts of a file, normalised as the pipeline's queries are, in their order.

    Args:
        path: .txt (one a line), .jsonl, .csv or .parquet.
        column: of the texts; None = "text". Not for .txt.

    Raises:
        SourceError: the file or column is missing, damaged or empty, or the column holds something else than texts.
    """
    if not path.is_file():
        raise SourceError(f"--input: {path} does not exist")
    texts = _lines(path) if path.suffix == ".txt" else _column(path, column or DEFAULT_COLUMN)
    if not texts:
        raise SourceError(f"--input: {path} holds no text")
    return [normalize_text(text) for text in texts]


def check_output(path: Path) -> None:
    """Raises SourceError unless the name says a format that `write_embeddings` knows."""
    if path.suffix not in OUTPUTS:
        raise SourceError(f"--output: unknown format '{path.suffix}' (known: {', '.join(OUTPUTS)})")


def write_embeddings(path: Path, texts: Sequence[str], embeddings: "np.ndarray[Any, Any]") -> None:
    """Write float32 [N, d] as .npy, or as .parquet with the columns `text` and `embedding`.

    Raises:
        SourceError: another suffix.
        WorkError: the disk is full.
    """
    import numpy as np

    check_output(path)
    sink = BytesIO()
    if path.suffix == ".npy":
        np.save(sink, embeddings)
    else:
        column = pl.Series("embedding", embeddings, dtype=pl.Array(pl.Float32, embeddings.shape[1]))
        pl.DataFrame({"text": list(texts), "embedding": column}).write_parquet(sink)
    write_bytes(path, sink.getvalue())


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _column(path: Path, column: str) -> list[str]:
    values = _table(path)
    if column not in values.columns:
        there = ", ".join(values.columns) or "none"
        raise SourceError(f"--input: {path}: no column '{column}' (columns there: {there}); choose one with --column")
    series = values[column]
    if series.dtype != pl.String:
        raise SourceError(f"--input: {path}: column '{column}' holds {series.dtype}, expected texts")
    if series.null_count():
        row = series.is_null().arg_true()[0]
        raise SourceError(
            f"--input: {path}: column '{column}' is null in {series.null_count()} rows, first in row {row}"
        )
    return series.to_list()


def _table(path: Path) -> pl.DataFrame:
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".jsonl": pl.read_ndjson,
        ".ndjson": pl.read_ndjson,
        ".csv": pl.read_csv,
        ".parquet": pl.read_parquet,
    }
    if path.suffix not in readers:
        raise SourceError(f"--input: unknown format '{path.suffix}' (known: .txt, {', '.join(readers)})")
    try:
        return readers[path.suffix](path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--input: {path} is damaged or no {path.suffix[1:]} file: {error}") from None
