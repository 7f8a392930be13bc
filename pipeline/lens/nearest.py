"""The latent lens: exact nearest neighbours of an embedding among known texts, by their vectors in the teacher's space.

An index is read in chunks and only the texts of neighbours are loaded, so memory does not grow with the index.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.artifacts import Artifact, open_artifact
from pipeline.core.errors import SourceError
from pipeline.core.files import digest_of
from pipeline.core.run import progress
from pipeline.core.vectors import matrix, top_k
from pipeline.encoder.embedded_by import stored_in

CHUNK_ROWS = 8192
# A larger index shows a progress bar.
QUICK_ROWS = 200_000


class Neighbour(NamedTuple):
    """A known text: its id (in a file its row), the cosine of its vector to the embedding, the text."""

    id: str
    cosine: float
    text: str


@dataclass(frozen=True)
class Index:
    """Known texts with vectors, made by `index_of_targets` or `open_index`.

    `version` changes with the content, `vectors` gives chunks float32 `[B, e]` from the first row, `entries` id and
    text of the given rows.
    """

    name: str
    version: str
    rows: int
    width: int
    vectors: Callable[[], Iterator[np.ndarray[Any, Any]]]
    entries: Callable[[set[int]], Mapping[int, tuple[str, str]]]


def nearest(embeddings: np.ndarray[Any, Any], index: Index, count: int) -> list[list[Neighbour]]:
    """The `count` texts of largest cosine to each embedding `[N, e]`, best first; of equal ones the first.

    Raises SourceError if the index has another width, or is damaged.
    """
    check_width(index, embeddings.shape[1])
    vectors = _with_progress(index) if index.rows > QUICK_ROWS else index.vectors()
    rows, cosines = top_k(embeddings, vectors, count)
    entries = index.entries(set(rows.reshape(-1).tolist()))

    def neighbour(row: int, cosine: float) -> Neighbour:
        name, text = entries[row]
        return Neighbour(name, cosine, text)

    return [list(map(neighbour, *best)) for best in zip(rows.tolist(), cosines.tolist(), strict=True)]


def check_width(index: Index, width: int) -> None:
    """Raises SourceError if the vectors of an index do not have the encoder's width."""
    if width != index.width:
        widths = f"{index.name} holds vectors of {index.width} dimensions, the encoder's have {width}"
        raise SourceError(f"{widths}: give the targets of its teacher, or the output of encode with it")


def _with_progress(index: Index) -> Iterator[np.ndarray[Any, Any]]:
    with progress(list[str](), total=index.rows, desc="search the index", unit="vector") as bar:
        for vectors in index.vectors():
            yield vectors
            bar.update(len(vectors))


def index_of_targets(targets: Artifact, responses: Artifact, only: Sequence[str] | None = None) -> Index:
    """The teacher's vectors of responses; `only` has the ids to include (held-out ones), None: all."""
    included = None if only is None else pa.array(only, pa.string())

    def batches(columns: list[str]) -> Iterator[pa.Table]:
        for table in targets.batches(columns, CHUNK_ROWS):
            yield table if included is None else table.filter(pc.is_in(table["id"], included))

    def entries(rows: set[int]) -> dict[int, tuple[str, str]]:
        ids = _at_rows((table["id"] for table in batches(["id"])), rows)
        texts = _responses(responses, list(ids.values()))
        return {row: (name, texts[name]) for row, name in ids.items()}

    return Index(
        name=str(targets.path),
        version=digest_of([targets.digest, responses.digest, None if only is None else list(only)]),
        rows=targets.manifest.rows if only is None else len(only),
        width=pq.read_schema(targets.tables()[0]).field("embedding").type.list_size,
        vectors=lambda: (matrix(table["embedding"]) for table in batches(["id", "embedding"])),
        entries=entries,
    )


def _responses(responses: Artifact, ids: Sequence[str]) -> dict[str, str]:
    wanted = pa.array(ids, pa.string())
    found: dict[str, str] = {}
    for table in responses.batches(["id", "response"], CHUNK_ROWS):
        table = table.filter(pc.is_in(table["id"], wanted))
        found |= dict(zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True))
    return found


def open_index(path: Path) -> Index:
    """The index in a data folder with `targets` and `responses`, or in a Parquet file that encode wrote.

    Raises ArtifactError or SourceError if it is missing, damaged, or has no texts with embeddings.
    """
    if path.is_dir():
        targets, responses = (open_artifact(path / kind, kind) for kind in ("targets", "responses"))
        return index_of_targets(targets, responses)
    if not path.exists():
        raise SourceError(f"{path} does not exist: give a data folder, or what encode wrote", argument="corpus")
    with _readable(path):
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    kind = schema.field("embedding").type if "embedding" in schema.names else None
    if "text" not in schema.names or kind is None or not pa.types.is_fixed_size_list(kind):
        needed = (
            f"needs the columns 'text' and 'embedding' as encode writes them (its columns: {', '.join(schema.names)})"
        )
        raise SourceError(f"{path} {needed}", argument="corpus")

    def entries(rows: set[int]) -> dict[int, tuple[str, str]]:
        return {row: (str(row), text) for row, text in _at_rows(_column(path, "text"), rows).items()}

    return Index(
        name=str(path),
        version=f"{path.stat().st_size} {path.stat().st_mtime_ns}",
        rows=metadata.num_rows,
        width=kind.list_size,
        vectors=lambda: (stored_in(path, column, kind.list_size) for column in _column(path, "embedding")),
        entries=entries,
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {error}", argument="corpus") from None


def _column(path: Path, name: str) -> Iterator[pa.ChunkedArray]:
    with _readable(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=[name]):
            yield pa.chunked_array([batch.column(0)])


def _at_rows(columns: Iterator[pa.ChunkedArray], rows: set[int]) -> dict[int, str]:
    """The values of a chunked column at some rows."""
    found: dict[int, str] = {}
    start = 0
    for column in columns:
        here = [row for row in rows if start <= row < start + len(column)]
        found |= {row: column[row - start].as_py() for row in here}
        start += len(column)
    return found
