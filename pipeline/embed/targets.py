"""The teacher embeds every usable response into a resumable store; targets are made of the stored vectors.

The store is keyed by query and response text, so only a response that changed is embedded again. Keys begin as the ids
do, so targets of neighbouring ids lie side by side. Of several samples a query's vector is the mean of the teacher's,
before anything is scaled or transformed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, repeat
from operator import attrgetter
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.core.artifacts import PART_BYTES
from pipeline.core.errors import TeacherError
from pipeline.core.files import bytes_sha256
from pipeline.core.gates import FIRST_ROWS
from pipeline.core.row_store import ShardStore
from pipeline.core.run import gpu_memory_mib, progress
from pipeline.core.schemas import QUERY_EMBEDDING, SAMPLES, TARGET_TYPES, targets_schema
from pipeline.core.target_transform import TargetTransform
from pipeline.core.tracking import ProgressLog
from pipeline.core.vectors import matrix
from pipeline.embed.params import EmbedParams, TargetType
from pipeline.embed.teachers.base import Teacher

log = logging.getLogger(__name__)

VERSION = 4
ID_BYTES = 72
QUERY_TRUNCATED = "query_truncated"
COLUMNS = ("id", "response", "finish_reason")
LOOKED_UP_ROWS = 4096  # whose keys are looked up together
MOST_ROWS = 2**18  # of a part; `PART_BYTES` alone would allow millions of narrow targets
NAMED_IDS = 5
FLOAT16_MAX = 65504.0


def fingerprint(teacher: Teacher) -> dict[str, Any]:
    """What decides a stored vector besides its text."""
    return {"version": VERSION, "teacher": teacher.identity}


def target_params(params: EmbedParams) -> dict[str, Any]:
    """What decides how targets are made of stored vectors, for the manifest."""
    queries = {"queries": True} if params.queries else {}
    return {"version": VERSION, **queries, **params.model_dump(include={"normalize", "transform", "dtype"})}


def store_schema(width: int, dtype: TargetType = "float32") -> pa.Schema:
    """Vectors with the token counts that a resumed run needs."""
    counted = [pa.field("tokens", pa.int32(), nullable=False), pa.field("truncated", pa.bool_(), nullable=False)]
    return pa.schema([*targets_schema(width, dtype), *counted])


def rows_per_part(width: int, dtype: TargetType) -> int:
    """Rows of a part of the targets, to stay below `PART_BYTES`."""
    return min(MOST_ROWS, max(1, PART_BYTES // (width * TARGET_TYPES[dtype].bit_width // 8 + ID_BYTES)))


def store_key(row_id: str, text: str) -> str:
    """The store's id of a query's response, or of the query itself."""
    return row_id[:16] + bytes_sha256(text.encode())[:16]


class Row(NamedTuple):
    """A usable response, or a query, and its key in the store; the responses to one query follow one another."""

    id: str
    key: str
    text: str


class UsableResponses:
    """The responses that did not fail and are not blank; each iteration reads them again, one batch at a time.

    `batches` gives tables of `COLUMNS`, and of `SAMPLES` where there are several `samples` a query. `skipped` counts
    the other responses of the last iteration, by reason.
    """

    def __init__(self, batches: Callable[[], Iterable[pa.Table]], samples: int = 1) -> None:
        self._batches, self.samples = batches, samples
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        skipped = self.skipped = Counter({"error": 0, "empty": 0})  # of this iteration: two may run at once
        for batch in self._batches():
            others = batch[SAMPLES.name].to_pylist() if self.samples > 1 else repeat([], batch.num_rows)
            columns = (batch[name].to_pylist() for name in COLUMNS)
            for row_id, text, finish, more in zip(*columns, others, strict=True):
                if finish != "error" and text.strip():
                    yield from (Row(row_id, store_key(row_id, answer), answer) for answer in (text, *more))
                else:
                    skipped["error" if finish == "error" else "empty"] += 1


def among(rows: Iterable[Row], ids: Iterable[str]) -> Iterator[Row]:
    """The rows whose ids are among `ids`; both are sorted by id, and one of each is held at a time."""
    following = iter(ids)
    wanted = next(following, None)
    for row in rows:
        while wanted is not None and wanted < row.id:
            wanted = next(following, None)
        if row.id == wanted:
            yield row


@dataclass(frozen=True)
class QueriesOf:
    """The query of the `responses` to each, in their order; each iteration reads both again.

    `texts` gives ids and texts of all queries, sorted by id. Iterating raises TeacherError if a query is missing.
    """

    responses: Iterable[Row]
    texts: Callable[[], Iterator[tuple[str, str]]]

    def __iter__(self) -> Iterator[Row]:
        following = self.texts()
        for row_id, _ in groupby(self.responses, attrgetter("id")):
            found, text = next((pair for pair in following if pair[0] >= row_id), ("", ""))
            if found != row_id:
                raise TeacherError(f"{row_id} has a response and is no query: run generate again", argument="queries")
            yield Row(row_id, store_key(row_id, text), text)


@dataclass
class Embedder:
    """One run.

    Attributes:
        store: the finished vectors by `store_key`.
        chunk_texts: most texts that the teacher gets at once.
        chunk_characters: most characters of them, unless one text alone has more.
        look: gets the first vectors of the run, `FIRST_ROWS` or more, once (schema `store_schema`).
        track: gets the progress.
    """

    store: ShardStore
    teacher: Teacher
    chunk_texts: int
    chunk_characters: int
    look: Callable[[pa.Table], None] | None = None
    track: ProgressLog = field(default_factory=lambda: ProgressLog(None))
    rows: int = 0
    computed_rows: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    gpu_memory_mib: dict[str, int] = field(default_factory=dict)
    _first: list[pa.Table] = field(default_factory=list)

    def run(self, *texts: Iterable[Row]) -> None:
        """Embed the responses, then what else is given (each iterated twice), that the store lacks.

        Raises TeacherError if an embedding is unusable; finished rows are kept.
        """
        self.rows, missing = 0, 0
        for rows, finished in chain.from_iterable(map(self._looked_up, texts)):
            self.rows, missing = self.rows + len(rows), missing + len(rows) - len(finished)
        if missing < self.rows:
            log.info("embed: %d of %d rows are done already", self.rows - missing, self.rows)
        started, self.computed_rows = monotonic(), 0
        bar: tqdm[Row] = progress([], total=self.rows, desc="embed", unit="text", initial=self.rows - missing)
        with bar:
            for some in texts:
                for chunk in self._chunks(self._missing(some)):
                    self._embed(chunk)
                    self.computed_rows += len(chunk)
                    bar.update(len(chunk))
                    rate = self.computed_tokens / max(monotonic() - started, 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                    self.track(int(bar.n), self.rows, rate)
                self.store.flush()  # a query may be its own answer
        self.seconds = monotonic() - started
        self.gpu_memory_mib = gpu_memory_mib()

    def tables(self, responses: Iterable[Row], rows_per_table: int) -> Iterator[pa.Table]:
        """A vector of each query with responses, in order (schema `store_schema`), `rows_per_table` rows a table."""
        queries = ((row_id, [row.key for row in rows]) for row_id, rows in groupby(responses, attrgetter("id")))
        while chunk := list(islice(queries, rows_per_table)):
            rows = self.store.take([key for _, keys in chunk for key in keys])
            ids = pa.array([row_id for row_id, _ in chunk], pa.string())
            yield means(rows, [len(keys) for _, keys in chunk]).set_column(0, self.store.schema.field("id"), ids)

    def summary(self) -> dict[str, Any]:
        """Counts and times of the run, for results/."""
        seconds = self.seconds or float("inf")
        return {
            "reused_rows": self.rows - self.computed_rows,
            "computed_rows": self.computed_rows,
            "computed_tokens": self.computed_tokens,
            "embed_seconds": round(self.seconds, 2),
            "texts_per_second": round(self.computed_rows / seconds, 1),
            "tokens_per_second": round(self.computed_tokens / seconds, 1),
            "gpu_memory_mib": self.gpu_memory_mib,
        }

    def _looked_up(self, responses: Iterable[Row]) -> Iterator[tuple[list[Row], set[str]]]:
        """The responses, `LOOKED_UP_ROWS` at a time, with the keys of those that the store has."""
        # An answer that was sampled twice is embedded once.
        same = ({row.key: row for row in rows}.values() for _, rows in groupby(responses, attrgetter("id")))
        rows = chain.from_iterable(same)
        while some := list(islice(rows, LOOKED_UP_ROWS)):
            yield some, self.store.committed(row.key for row in some)

    def _missing(self, responses: Iterable[Row]) -> Iterator[Row]:
        for rows, finished in self._looked_up(responses):
            yield from (row for row in rows if row.key not in finished)

    def _chunks(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        chunk: list[Row] = []
        characters = 0
        for row in rows:
            if chunk and (len(chunk) == self.chunk_texts or characters + len(row.text) > self.chunk_characters):
                yield chunk
                chunk, characters = [], 0
            chunk.append(row)
            characters += len(row.text)
        if chunk:
            yield chunk

    def _embed(self, rows: Sequence[Row]) -> None:
        texts = [row.text for row in rows]
        vectors = self.teacher.embed(texts)
        check_vectors([row.id for row in rows], vectors, self.teacher.width)
        whole, limit = np.array(self.teacher.token_lengths(texts)), self.teacher.max_tokens
        tokens = np.minimum(whole, whole if limit is None else limit)
        self.computed_tokens += int(tokens.sum())
        kind = self.store.schema.field("embedding").type
        columns = [
            pa.array([row.key for row in rows], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).reshape(-1)), type=kind),
            pa.array(tokens, pa.int32()),
            pa.array(whole > tokens),
        ]
        table = pa.Table.from_arrays(columns, schema=self.store.schema)
        self.store.add_table(table)
        self._look_at(table)

    def _look_at(self, table: pa.Table) -> None:
        if self.look is None:
            return
        self._first.append(table)
        if sum(part.num_rows for part in self._first) >= FIRST_ROWS:
            self.look(pa.concat_tables(self._first))
            self.look, self._first = None, []


def means(rows: pa.Table, counts: Sequence[int]) -> pa.Table:
    """The mean vector of each `counts` rows of a table of `store_schema`: their tokens in all, truncated if one is."""
    if len(counts) == rows.num_rows:
        return rows
    starts = np.cumsum([0, *counts[:-1]])
    vectors = np.add.reduceat(matrix(rows["embedding"]), starts) / np.array(counts, np.float32)[:, None]
    columns = {
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=rows.schema.field("embedding").type
        ),
        "tokens": pa.array(np.add.reduceat(rows["tokens"].to_numpy(), starts), pa.int32()),
        "truncated": pa.array(np.logical_or.reduceat(rows["truncated"].to_numpy(zero_copy_only=False), starts)),
    }
    found = rows.take(pa.array(starts))
    for name, column in columns.items():
        found = found.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return found


@dataclass(frozen=True)
class Finish:
    """From stored vectors to targets of `dtype`: scaled to length 1 if `normalize`, then transformed if at all."""

    normalize: bool
    dtype: TargetType
    transform: TargetTransform | None = None

    def vectors(self, table: pa.Table) -> np.ndarray:
        """What the transform is fitted on: float32 `[N, d]` of a table of `store_schema`."""
        vectors = matrix(table.column("embedding"))
        return unit_length(table.column("id").to_pylist(), vectors) if self.normalize else vectors

    def __call__(self, table: pa.Table) -> pa.Table:
        """A table of `store_schema` with targets in place of stored vectors.

        Raises TeacherError if a zero vector cannot be normalised, or a value does not fit into `dtype`.
        """
        vectors = self.vectors(table)
        if self.transform is not None:
            vectors = self.transform.map(vectors)
        schema = store_schema(vectors.shape[1], self.dtype)
        values = pa.array(cast(table.column("id").to_pylist(), vectors, self.dtype).reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
        return table.set_column(1, schema.field("embedding"), embeddings).cast(schema)

    def beside(self, table: pa.Table, queries: pa.Table) -> pa.Table:
        """As a call, with the targets of the `queries` of the same rows, stored in the same way, beside the others."""
        made = self(queries)
        beside = self(table).append_column(made.field("embedding").with_name(QUERY_EMBEDDING), made["embedding"])
        return beside.append_column(QUERY_TRUNCATED, queries["truncated"])


def check_vectors(ids: Sequence[str], vectors: np.ndarray, width: int) -> None:
    """Raises TeacherError unless `vectors` is `[len(ids), width]` and finite."""
    if vectors.shape != (len(ids), width):
        wanted = (len(ids), width)
        raise TeacherError(f"the teacher gave an array {vectors.shape} for {len(ids)} texts, must be {wanted}")
    if not np.isfinite(vectors).all():
        bad = _name(ids, ~np.isfinite(vectors).all(axis=1))
        raise TeacherError(f"the teacher gave NaN or infinite values for {bad}: try float32", argument="teacher.dtype")


def unit_length(ids: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """Vectors `[N, d]` over their lengths. Raises TeacherError if one is zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        zero = _name(ids, lengths[:, 0] == 0)
        raise TeacherError(f"the teacher gave a vector of zeros for {zero}", argument="normalize")
    return vectors / lengths


def cast(ids: Sequence[str], vectors: np.ndarray, dtype: TargetType) -> np.ndarray:
    """Vectors `[N, d]` in `dtype`. Raises TeacherError if a value is too large."""
    largest = float(np.abs(vectors).max(initial=0.0))
    if dtype == "float16" and largest > FLOAT16_MAX:
        bad = _name(ids, np.abs(vectors).max(axis=1) > FLOAT16_MAX)
        raise TeacherError(
            f"float16 holds up to {FLOAT16_MAX:.0f}, the largest value is {largest:.6g} for {bad}: set float32",
            argument="dtype",
        )
    return vectors.astype(dtype)


def _name(ids: Sequence[str], bad: np.ndarray) -> str:
    named = [row_id for row_id, is_bad in zip(ids, bad, strict=True) if is_bad]
    more = f" and {len(named) - NAMED_IDS} more" if len(named) > NAMED_IDS else ""
    return f"{len(named)} of {len(ids)} texts: {', '.join(named[:NAMED_IDS])}{more}"
