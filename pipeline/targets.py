"""Let the teacher embed every usable response into a resumable store.

The store is keyed by the response's text and not by the query's id: a query that was answered anew is embedded anew,
and an answer that many queries share is embedded once.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from tqdm import tqdm

from pipeline.artifacts import PART_BYTES, bytes_sha256
from pipeline.contracts import TARGET_TYPES
from pipeline.errors import TeacherError
from pipeline.params import Params
from pipeline.runtime import progress
from pipeline.shards import ShardStore
from pipeline.teachers import TeacherParams
from pipeline.teachers.base import Teacher

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

VERSION = 1
ID_BYTES = 72
# Batches handed to the teacher at once: it sorts them by length, and what is in hand is lost when killed.
CHUNK_BATCHES = 8
NAMED_IDS = 5
FLOAT16_MAX = 65504.0

TargetType = Literal["float16", "float32"]


class EmbedParams(Params):
    """Section `embed`."""

    teacher: TeacherParams
    normalize: bool = Field(default=False, description="scale targets to length 1; changes the balance of the losses")
    dtype: TargetType = Field(default="float16", description="of the stored targets")


@dataclass(frozen=True)
class Usable:
    """The responses to embed (id -> text), and how many rows are left out for which reason."""

    texts: dict[str, str]
    skipped: dict[str, int]


def usable_responses(responses: pa.Table) -> Usable:
    """The rows (columns id, response, finish_reason) that have an answer: not failed, not blank."""
    failed = pc.equal(responses.column("finish_reason"), "error")
    blank = pc.equal(pc.utf8_trim_whitespace(responses.column("response")), "")
    kept = responses.filter(pc.invert(pc.or_(failed, blank)))
    errors = pc.sum(failed).as_py() or 0
    empty = pc.sum(pc.and_(blank, pc.invert(failed))).as_py() or 0
    texts = dict(zip(kept.column("id").to_pylist(), kept.column("response").to_pylist(), strict=True))
    return Usable(texts, {"error": errors, "empty": empty})


def fingerprint(teacher: Teacher, params: EmbedParams) -> dict[str, Any]:
    """What decides the bytes of a target besides its text."""
    return {"version": VERSION, "teacher": teacher.identity, "normalize": params.normalize, "dtype": params.dtype}


def rows_per_part(width: int, dtype: TargetType) -> int:
    """Rows that keep a part of the targets below `PART_BYTES`."""
    return max(1, PART_BYTES // (width * TARGET_TYPES[dtype].bit_width // 8 + ID_BYTES))


def text_key(text: str) -> str:
    """The store's id of a text."""
    return bytes_sha256(text.encode())[:32]


@dataclass
class Embedder:
    """The work of one run.

    Attributes:
        store: holds the vectors of finished texts by `text_key` (schema `contracts.targets_schema`).
        teacher: embeds.
        normalize: scale targets to length 1.
        dtype: of the stored targets.
        chunk_rows: texts handed to the teacher at once.
    """

    store: ShardStore
    teacher: Teacher
    normalize: bool
    dtype: TargetType
    chunk_rows: int
    computed_texts: int = 0
    computed_rows: int = 0
    seconds: float = 0.0

    def run(self, texts: Mapping[str, str]) -> None:
        """Embed the texts (id -> text) that the store lacks.

        Raises:
            TeacherError: an embedding is unusable; finished rows are kept.
        """
        keys = {row_id: text_key(text) for row_id, text in texts.items()}
        missing = {row_id: key for row_id, key in keys.items() if key not in self.store}
        # Of the ids that share a text, the smallest stands for it.
        todo = {key: row_id for row_id, key in sorted(missing.items(), reverse=True)}
        if len(missing) < len(texts):
            log.info("embed: %d of %d rows are done already", len(texts) - len(missing), len(texts))
        started = monotonic()
        self._embed_all(sorted(todo.values()), texts)
        self.computed_texts, self.computed_rows, self.seconds = len(todo), len(missing), monotonic() - started

    def tables(self, texts: Mapping[str, str], rows_per_table: int) -> Iterator[pa.Table]:
        """Targets of `texts` (id -> text), sorted by id, in tables of at most `rows_per_table` rows."""
        ordered = sorted(texts)
        for start in range(0, len(ordered), rows_per_table):
            ids = ordered[start : start + rows_per_table]
            keys = [text_key(texts[row_id]) for row_id in ids]
            distinct = sorted(set(keys))
            (vectors,) = self.store.sorted_tables(distinct, len(distinct))
            position = {key: index for index, key in enumerate(distinct)}
            rows = vectors.take([position[key] for key in keys])
            yield rows.set_column(0, self.store.schema.field("id"), pa.array(ids, pa.string()))

    def _embed_all(self, ids: Sequence[str], texts: Mapping[str, str]) -> None:
        bar: tqdm[str] = progress([], total=len(ids), desc="embed", unit="text")
        with bar:
            for start in range(0, len(ids), self.chunk_rows):
                chunk = ids[start : start + self.chunk_rows]
                self._embed(chunk, [texts[row_id] for row_id in chunk])
                bar.update(len(chunk))
        self.store.flush()

    def _embed(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        vectors = self.teacher.embed(texts)
        check_vectors(ids, vectors, self.teacher.width)
        if self.normalize:
            vectors = unit_length(ids, vectors)
        for text, vector in zip(texts, cast(ids, vectors, self.dtype), strict=True):
            self.store.add({"id": text_key(text), "embedding": vector})


def check_vectors(ids: Sequence[str], vectors: "np.ndarray[Any, Any]", width: int) -> None:
    """Raises TeacherError unless `vectors` is [len(ids), width] and finite."""
    import numpy as np

    if vectors.shape != (len(ids), width):
        raise TeacherError(
            f"the teacher gave an array {vectors.shape} for {len(ids)} texts, must be {(len(ids), width)}"
        )
    if not np.isfinite(vectors).all():
        bad = _name(ids, ~np.isfinite(vectors).all(axis=1))
        raise TeacherError(f"the teacher gave NaN or infinite values for {bad}: try embed.teacher.dtype float32")


def unit_length(ids: Sequence[str], vectors: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Vectors [N, d] over their lengths. Raises TeacherError if one has none."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise TeacherError(f"embed.normalize: the teacher gave a vector of zeros for {_name(ids, lengths[:, 0] == 0)}")
    return vectors / lengths


def cast(ids: Sequence[str], vectors: "np.ndarray[Any, Any]", dtype: TargetType) -> "np.ndarray[Any, Any]":
    """Vectors [N, d] in `dtype`. Raises TeacherError if a value does not fit into it."""
    import numpy as np

    largest = float(np.abs(vectors).max(initial=0.0))
    if dtype == "float16" and largest > FLOAT16_MAX:
        bad = _name(ids, np.abs(vectors).max(axis=1) > FLOAT16_MAX)
        raise TeacherError(
            f"embed.dtype: float16 holds up to {FLOAT16_MAX:.0f}, the teacher gave {largest:.6g} for {bad}: "
            "set embed.dtype: float32"
        )
    return vectors.astype(dtype)


def _name(ids: Sequence[str], bad: "np.ndarray[Any, Any]") -> str:
    named = [row_id for row_id, is_bad in zip(ids, bad, strict=True) if is_bad]
    more = f" and {len(named) - NAMED_IDS} more" if len(named) > NAMED_IDS else ""
    return f"{len(named)} of {len(ids)} texts: {', '.join(named[:NAMED_IDS])}{more}"


@dataclass
class NormStatistics:
    """Mean and standard deviation of the targets' lengths: their scale decides the balance of the losses."""

    rows: int = 0
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables of targets unchanged, their lengths added up."""
        for table in tables:
            if table.num_rows:
                self._add(table)
            yield table

    def summary(self) -> dict[str, float]:
        """`norm_mean` and `norm_std` so far."""
        mean = self._sum / self.rows if self.rows else 0.0
        variance = self._squares / self.rows - mean**2 if self.rows else 0.0
        return {"norm_mean": round(mean, 6), "norm_std": round(math.sqrt(max(variance, 0.0)), 6)}

    def _add(self, table: pa.Table) -> None:
        import numpy as np

        column = table.column("embedding").combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1)
        self.rows += len(lengths)
        self._sum += float(lengths.sum())
        self._squares += float((lengths**2).sum())
