"""The latent lens: the known texts whose vectors in the teacher's space are nearest to an embedding, exactly.

An index is gone through in chunks, so memory does not grow with it, and only the texts that were found are kept.
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

from pipeline.core.artifacts import Artifact, digest_of, open_artifact
from pipeline.core.errors import SourceError
from pipeline.core.run import progress
from pipeline.core.vectors import matrix, top_k

CHUNK_ROWS = 8192
# Fewer are gone through before a bar is read.
QUICK_ROWS = 200_000


class Near(NamedTuple):
    """A known text: its id (in a file its row), the cosine of its vector to the embedding, the text."""

    id: str
    cosine: float
    text: str


@dataclass(frozen=True)
class Index:
    """Known texts with vectors; `index_of_targets` and `open_index` make one.

    Attributes:
        name: in messages.
        version: changes with what it holds.
        rows: how many texts.
        width: of a vector.
        vectors: float32 `[B, e]` chunk by chunk, from the first on at each call.
        entries: id and text of each row that is asked for.
    """

    name: str
    version: str
    rows: int
    width: int
    vectors: Callable[[], Iterator[np.ndarray[Any, Any]]]
    entries: Callable[[set[int]], Mapping[int, tuple[str, str]]]


def nearest(embeddings: np.ndarray[Any, Any], index: Index, count: int) -> list[list[Near]]:
    """Of each embedding `[N, e]` the `count` texts of largest cosine, best first; of equal ones the first.

    Raises:
        SourceError: the index is of another width, or damaged.
    """
    check_width(index, embeddings.shape[1])
    vectors = _told(index) if index.rows > QUICK_ROWS else index.vectors()
    rows, cosines = top_k(embeddings, vectors, count)
    entries = index.entries(set(rows.reshape(-1).tolist()))
    return [
        [_near(entries[row], cosine) for row, cosine in zip(found, near, strict=True)]
        for found, near in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]


def check_width(index: Index, width: int) -> None:
    """Raises SourceError if an index is not of the encoder's width."""
    if width != index.width:
        raise SourceError(
            f"{index.name} holds vectors of {index.width} dimensions, the encoder's have {width}: "
            "give the targets of its teacher, or what encode wrote with it"
        )


def _near(entry: tuple[str, str], cosine: float) -> Near:
    return Near(entry[0], cosine, entry[1])


def _told(index: Index) -> Iterator[np.ndarray[Any, Any]]:
    nothing: list[str] = []
    with progress(nothing, total=index.rows, desc="look through the index", unit="vector") as bar:
        for vectors in index.vectors():
            yield vectors
            bar.update(len(vectors))


def index_of_targets(targets: Artifact, responses: Artifact, only: Sequence[str] | None = None) -> Index:
    """The teacher's vectors of responses.

    Args:
        targets: the artifact.
        responses: whose texts they are.
        only: ids to leave it at (held-out ones); None: all.
    """
    kept = None if only is None else pa.array(only, pa.string())

    def batches(columns: list[str]) -> Iterator[pa.Table]:
        for table in targets.batches(columns, CHUNK_ROWS):
            yield table if kept is None else table.filter(pc.is_in(table["id"], kept))

    def entries(rows: set[int]) -> dict[int, tuple[str, str]]:
        ids = _at_rows((table["id"] for table in batches(["id"])), rows)
        texts = _responses(responses, list(ids.values()))
        return {row: (name, texts[name]) for row, name in ids.items()}

    width = pq.read_schema(targets.tables()[0]).field("embedding").type.list_size
    return Index(
        name=str(targets.path),
        version=digest_of([targets.digest, responses.digest, None if only is None else list(only)]),
        rows=targets.manifest.rows if only is None else len(only),
        width=width,
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


def open_index(path: Path, option: str = "--corpus") -> Index:
    """An index of a user's path: a data folder with `targets` and `responses`, or a Parquet file that encode wrote.

    Raises:
        ArtifactError: an artifact of the folder is missing or damaged.
        SourceError: the file is missing or damaged, or has no texts with embeddings.
    """
    if path.is_dir():
        targets, responses = (open_artifact(path / kind, kind) for kind in ("targets", "responses"))
        return index_of_targets(targets, responses)
    with _damage(path, option):
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    kind = schema.field("embedding").type if "embedding" in schema.names else None
    if "text" not in schema.names or kind is None or not pa.types.is_fixed_size_list(kind):
        raise SourceError(
            f"{option}: {path} needs the columns 'text' and 'embedding' as encode writes them (columns there: "
            f"{', '.join(schema.names)}): make it with encode --output NAME.parquet"
        )

    def entries(rows: set[int]) -> dict[int, tuple[str, str]]:
        return {row: (str(row), text) for row, text in _at_rows(_column(path, "text", option), rows).items()}

    return Index(
        name=str(path),
        version=f"{path.stat().st_size} {path.stat().st_mtime_ns}",
        rows=metadata.num_rows,
        width=kind.list_size,
        vectors=lambda: map(matrix, _column(path, "embedding", option)),
        entries=entries,
    )


@contextmanager
def _damage(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{option}: {path} cannot be read as Parquet: {error}") from None


def _column(path: Path, name: str, option: str) -> Iterator[pa.ChunkedArray]:
    with _damage(path, option), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=[name]):
            yield pa.chunked_array([batch.column(0)])


def _at_rows(columns: Iterator[pa.ChunkedArray], rows: set[int]) -> dict[int, str]:
    """The values at these rows of a column that comes in chunks."""
    found: dict[int, str] = {}
    start = 0
    for column in columns:
        here = [row for row in rows if start <= row < start + len(column)]
        found |= {row: column[row - start].as_py() for row in here}
        start += len(column)
    return found
