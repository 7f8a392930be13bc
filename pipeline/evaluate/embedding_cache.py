"""Embeddings stored on disk, so that a system embeds each text once: within a suite and after a kill.

They are rounded to the store's type before anything is scored, so a score does not depend on what was stored.

A store is keyed by all that decides an embedding besides the text (weights, prompting, precision), a row by a hash of
the system's cache key. Its id begins with a hash of the instruction and side that came with it first: the texts of a
task then lie side by side and are read without the rest of the store.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.errors import BusyError, EvaluationError
from pipeline.core.files import bytes_sha256, digest_of
from pipeline.core.row_store import ShardStore
from pipeline.core.run import progress
from pipeline.core.schemas import TARGET_TYPES
from pipeline.core.text import by_length
from pipeline.core.vectors import matrix
from pipeline.embed.params import TargetType
from pipeline.evaluate.system import VERSION, System, failed_texts, prepare
from pipeline.tasks.instructions import Side

log = logging.getLogger(__name__)

# A kill loses one chunk at most: so many texts or characters, whichever comes first.
CHUNK_TEXTS = 4096
CHUNK_CHARACTERS = 2**20
TAKE_ROWS = 8192  # rows read at once
_GROUP, _CONTENT = 8, 32  # hex digits of the two hashes in an id


class CachedSystem:
    """A `System` around another that reads from disk what the other has embedded before.

    `reused` and `computed` count the distinct cache keys so far that were found on disk, and that `system` embedded.
    """

    def __init__(
        self,
        system: System,
        root: Path | None,
        *,
        embeddings_dtype: TargetType = "float32",
        chunk_characters: int | None = None,
        **conditions: Any,
    ) -> None:
        """Keep embeddings as `embeddings_dtype` below `root`; None stores nothing, and rounds all the same.

        A kill loses `chunk_characters` of texts at most (None: `CHUNK_CHARACTERS`).
        `conditions` decide embeddings besides identity and prompting, e.g. the model's dtype; they serialise to JSON.
        """
        self.system, self.reused, self.computed = system, 0, 0
        self.embeddings_dtype, self._chunk_characters = embeddings_dtype, chunk_characters
        self.name, self.identity, self.prompting = system.name, system.identity, system.prompting
        self._root = root
        self._fingerprint = {
            "version": VERSION,
            "identity": self.identity,
            "prompting": self.prompting,
            "conditions": conditions,
        }
        self._stack = ExitStack()
        self._stored: _StoredEmbeddings | None = None

    def close(self) -> None:
        """Commit pending rows and release the store; the next text opens it again."""
        self._stored = None
        self._stack.close()

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return self.system.cache_key(text, instruction, side)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """See `System.encode`; each distinct cache key is embedded once.

        Raises EvaluationError if the system gave an array of the wrong shape, WorkError if the disk is full.
        """
        if not texts:
            return self.system.encode(texts, instruction, side)
        contents = [_content(self.cache_key(text, instruction, side)) for text in texts]
        distinct: dict[str, str] = {}
        for content, text in zip(contents, texts, strict=True):
            distinct.setdefault(content, text)
        rows, stored = _Rows(self.name, distinct), self._open()
        missing = {content: text for content, text in distinct.items() if content not in stored}
        for some, vectors in stored.take([content for content in distinct if content not in missing]):
            rows.put(some, vectors)
        group = _group(instruction, side)
        if missing:
            prepare(self.system, list(missing.values()), instruction, side)
        chunks: Collection[list[str]] = _chunks(missing, self._chunk_characters or CHUNK_CHARACTERS)
        if len(chunks) > 1:
            chunks = progress(chunks, total=len(chunks), desc=f"encode {self.name}", unit="chunk")
        for chunk in chunks:
            failed = failed_texts(self.system)
            encoded = self.system.encode([missing[content] for content in chunk], instruction, side)
            vectors = self._rounded(encoded)
            rows.put(chunk, vectors.astype(np.float32))
            if failed == failed_texts(self.system):
                stored.add(group, chunk, vectors)
        self.reused += len(distinct) - len(missing)
        self.computed += len(missing)
        return rows.of(contents)

    def keep(self, texts: Sequence[str], embeddings: np.ndarray, instruction: str, side: Side) -> None:
        """Store embeddings of distinct texts that came with those of another system; raises as `encode`."""
        contents, stored = [_content(self.cache_key(text, instruction, side)) for text in texts], self._open()
        new = [row for row, content in enumerate(contents) if content not in stored]
        stored.add(_group(instruction, side), [contents[row] for row in new], self._rounded(embeddings[new]))

    def _rounded(self, embeddings: np.ndarray) -> np.ndarray:
        """Raises EvaluationError if a finite value is too large for the type."""
        vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
        largest = float(np.abs(vectors, where=np.isfinite(vectors), out=np.zeros_like(vectors)).max(initial=0.0))
        limit = float(np.finfo(self.embeddings_dtype).max)
        if largest > limit:
            raise EvaluationError(
                f"{self.name} gave {largest:.6g}, {self.embeddings_dtype} holds up to {limit:.6g}: "
                "set embeddings_dtype to float32",
                argument="embeddings_dtype",
            )
        return vectors.astype(self.embeddings_dtype)

    def _open(self) -> "_StoredEmbeddings":
        """The store; without a root, or where another process uses it, an empty one that stores nothing."""
        if self._stored is None:
            store = None
            try:
                if self._root is not None:
                    schema = _schema(self.embeddings_dtype)
                    store = self._stack.enter_context(ShardStore(self._root, schema, self._fingerprint))
            except BusyError as error:
                log.warning("%s embeds without its cache: %s", self.name, error)
            self._stored = _StoredEmbeddings(store)
        return self._stored


class _StoredEmbeddings:
    """Embeddings by content hash in a row store; with None, nothing is stored."""

    def __init__(self, store: ShardStore | None) -> None:
        self._store = store
        self._ids = {row_id[_GROUP:]: row_id for row_id in store} if store else {}

    def __contains__(self, content: str) -> bool:
        return content in self._ids

    def take(self, contents: Iterable[str]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Stored contents and their embeddings float32 [n, d], up to `TAKE_ROWS` at a time, sorted by id."""
        ids = sorted(self._ids[content] for content in contents)
        for _, group in groupby(ids, key=lambda row_id: row_id[:_GROUP]):
            rows = list(group)
            for start in range(0, len(rows), TAKE_ROWS):
                some = rows[start : start + TAKE_ROWS]
                assert self._store is not None
                yield [row_id[_GROUP:] for row_id in some], matrix(self._store.take(some)["embedding"])

    def add(self, group: str, contents: Sequence[str], vectors: np.ndarray) -> None:
        if self._store is None or not contents:
            return
        finite = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        ids = {contents[row]: group + contents[row] for row in finite}
        width = vectors.shape[1]
        offsets = pa.array(np.arange(0, (len(finite) + 1) * width, width), pa.int32())
        column = pa.ListArray.from_arrays(offsets, pa.array(vectors[finite].reshape(-1)))
        table = pa.Table.from_arrays([pa.array(ids.values(), pa.string()), column], schema=self._store.schema)
        self._store.add_table(table)
        self._store.flush()
        self._ids |= ids


class _Rows:
    """Embeddings float32 of distinct contents, gathered in any order."""

    def __init__(self, system: str, contents: Iterable[str]) -> None:
        self._system = system
        self._rows = {content: row for row, content in enumerate(contents)}
        self._vectors: np.ndarray | None = None

    def put(self, contents: Sequence[str], vectors: np.ndarray) -> None:
        """Raises EvaluationError unless there is a vector for each of the contents, of the width of all."""
        if self._vectors is None and vectors.ndim == 2:
            self._vectors = np.empty((len(self._rows), vectors.shape[1]), dtype=np.float32)
        if self._vectors is None or vectors.shape != (len(contents), self._vectors.shape[1]):
            width = "width" if self._vectors is None else self._vectors.shape[1]
            texts = len(contents)
            raise EvaluationError(f"{self._system} gave an array {vectors.shape}, must be ({texts}, {width})")
        self._vectors[[self._rows[content] for content in contents]] = vectors

    def of(self, contents: Sequence[str]) -> np.ndarray:
        assert self._vectors is not None
        if len(contents) == len(self._rows):
            return self._vectors
        return self._vectors[[self._rows[content] for content in contents]]


def _schema(dtype: TargetType) -> pa.Schema:
    """Without the width, which is unknown before the first embedding."""
    return pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("embedding", pa.list_(TARGET_TYPES[dtype]))]
    )


def _group(instruction: str, side: Side) -> str:
    return digest_of([instruction, side])[:_GROUP]


def _content(key: str) -> str:
    return bytes_sha256(key.encode("utf-8", "surrogatepass"))[:_CONTENT]


def _chunks(texts: Mapping[str, str], most_characters: int) -> list[list[str]]:
    """The keys of texts by falling length, in chunks of limited texts and characters."""
    contents = list(texts)
    groups = by_length(list(texts.values()), CHUNK_TEXTS, most_characters)
    return [[contents[row] for row in group] for group in groups]
