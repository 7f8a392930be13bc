"""Embeddings kept on the disk, so that no system embeds a text twice: not within a suite, not after a kill.

A system's store lies under all that decides an embedding besides the text (weights, prompting, precision), so two
weights never share. A row is found by what the system reads of a text; its id begins with a hash of the instruction
and the side under which it first came, so that the texts of a task lie side by side and are read back without the
rest of the store.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
from tqdm import tqdm

from pipeline.core.artifacts import bytes_sha256, digest_of
from pipeline.core.errors import EvaluationError, WorkError
from pipeline.core.row_store import ShardStore
from pipeline.core.run import progress
from pipeline.core.vectors import matrix
from pipeline.evaluate.system import VERSION, System, failures
from pipeline.tasks.instructions import Side

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

# It names no width, which nobody knows before the first embedding.
SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("embedding", pa.list_(pa.float32()))])
# What a kill costs at most, whichever comes first.
CHUNK_TEXTS = 4096
CHUNK_CHARACTERS = 2**20
# Rows read back at once.
TAKE_ROWS = 8192
_PLACE, _CONTENT = 8, 32  # hex digits


class CachedSystem:
    """`System` around another: what that one has embedded before is read from the disk.

    Attributes:
        system: embeds what is missing.
        reused: distinct readings that were found on the disk, over all calls.
        computed: distinct readings that `system` embedded, over all calls.
    """

    def __init__(self, system: System, root: Path, **conditions: Any) -> None:
        """Nothing is opened before the first text comes.

        Args:
            system: embeds what is missing.
            root: folder of the stores.
            conditions: what decides embeddings besides its identity and prompting (serialises to JSON), as the dtype.
        """
        self.system, self.reused, self.computed = system, 0, 0
        self._root = root
        self._fingerprint = {
            "version": VERSION,
            "identity": system.identity,
            "prompting": system.prompting,
            "conditions": conditions,
        }
        self._open = ExitStack()
        self._kept: _Kept | None = None

    @property
    def name(self) -> str:
        """See `System`."""
        return self.system.name

    @property
    def identity(self) -> dict[str, Any]:
        """See `System`."""
        return self.system.identity

    @property
    def prompting(self) -> str:
        """See `System`."""
        return self.system.prompting

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Commit what is pending and let other processes have the store; the next text opens it again."""
        self._kept = None
        self._open.close()

    def reading(self, text: str, instruction: str, side: Side) -> str:
        """See `System.reading`."""
        return self.system.reading(text, instruction, side)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> "np.ndarray[Any, Any]":
        """See `System.encode`. Each distinct reading is embedded once.

        Raises:
            EvaluationError: the system gave an array of another shape than it must.
            WorkError: the disk is full.
        """
        if not texts:
            return self.system.encode(texts, instruction, side)
        contents = [_content(self.reading(text, instruction, side)) for text in texts]
        distinct: dict[str, str] = {}
        for content, text in zip(contents, texts, strict=True):
            distinct.setdefault(content, text)
        rows, kept = _Rows(self.name, distinct), self._stored()
        missing = {content: text for content, text in distinct.items() if content not in kept}
        for some, vectors in kept.take([content for content in distinct if content not in missing]):
            rows.put(some, vectors)
        failed = failures(self.system)
        for some, vectors in self._embedded(missing, instruction, side):
            rows.put(some, vectors)
            if failed == failures(self.system):
                kept.add(digest_of([instruction, side])[:_PLACE], some, vectors)
            failed = failures(self.system)
        self.reused += len(distinct) - len(missing)
        self.computed += len(missing)
        return rows.of(contents)

    def _stored(self) -> "_Kept":
        """The store, opened; an empty one that keeps nothing where it cannot be."""
        if self._kept is None:
            try:
                store = self._open.enter_context(ShardStore(self._root, SCHEMA, self._fingerprint))
            except WorkError as error:
                log.warning("%s embeds without its cache: %s", self.name, error)
                store = None
            self._kept = _Kept(store)
        return self._kept

    def _embedded(
        self, missing: Mapping[str, str], instruction: str, side: Side
    ) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        """Contents and embeddings float32 of the texts by content, chunk by chunk, the longest first."""
        import numpy as np

        chunks = list(_chunks(missing))
        with _bar(self.name, len(missing)) if len(chunks) > 1 else nullcontext() as bar:
            for chunk in chunks:
                texts = [missing[content] for content in chunk]
                yield chunk, np.ascontiguousarray(self.system.encode(texts, instruction, side), dtype=np.float32)
                if bar is not None:
                    bar.update(len(chunk))


class _Kept:
    """Embeddings by content in a store; None keeps nothing."""

    def __init__(self, store: ShardStore | None) -> None:
        self._store = store
        self._ids = {row_id[_PLACE:]: row_id for row_id in store} if store else {}

    def __contains__(self, content: str) -> bool:
        return content in self._ids

    def take(self, contents: Iterable[str]) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        """Contents and embeddings of what is kept, some thousand at a time, in an order of their own."""
        ids = sorted(self._ids[content] for content in contents)
        for _, neighbours in groupby(ids, key=lambda row_id: row_id[:_PLACE]):
            place = list(neighbours)
            for start in range(0, len(place), TAKE_ROWS):
                some = place[start : start + TAKE_ROWS]
                assert self._store is not None
                yield [row_id[_PLACE:] for row_id in some], matrix(self._store.take(some)["embedding"])

    def add(self, place: str, contents: Sequence[str], vectors: "np.ndarray[Any, Any]") -> None:
        """Keep the embeddings that are finite."""
        import numpy as np

        if self._store is None:
            return
        good = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        ids = {contents[row]: place + contents[row] for row in good}
        width = vectors.shape[1]
        ends = pa.array(np.arange(0, (len(good) + 1) * width, width), pa.int32())
        column = pa.ListArray.from_arrays(ends, pa.array(vectors[good].reshape(-1)))
        self._store.add_table(pa.Table.from_arrays([pa.array(ids.values(), pa.string()), column], schema=SCHEMA))
        self._store.flush()
        self._ids |= ids


class _Rows:
    """Embeddings float32 of distinct contents, gathered in any order."""

    def __init__(self, system: str, contents: Iterable[str]) -> None:
        self._system = system
        self._places = {content: place for place, content in enumerate(contents)}
        self._vectors: np.ndarray[Any, Any] | None = None

    def put(self, contents: Sequence[str], vectors: "np.ndarray[Any, Any]") -> None:
        """Raises EvaluationError unless there is a vector for each of the contents, of the width of all."""
        import numpy as np

        if self._vectors is None and vectors.ndim == 2:
            self._vectors = np.empty((len(self._places), vectors.shape[1]), dtype=np.float32)
        if self._vectors is None or vectors.shape != (len(contents), self._vectors.shape[1]):
            width = "width" if self._vectors is None else self._vectors.shape[1]
            raise EvaluationError(
                f"{self._system} gave an array {vectors.shape} for {len(contents)} texts, must be "
                f"({len(contents)}, {width})"
            )
        self._vectors[[self._places[content] for content in contents]] = vectors

    def of(self, contents: Sequence[str]) -> "np.ndarray[Any, Any]":
        """Embeddings of the contents, in their order."""
        assert self._vectors is not None
        if len(contents) == len(self._places):
            return self._vectors
        return self._vectors[[self._places[content] for content in contents]]


def _bar(system: str, texts: int) -> "tqdm[str]":
    nothing: Sequence[str] = ()
    return progress(nothing, total=texts, desc=f"encode {system}", unit="text")


def _content(reading: str) -> str:
    return bytes_sha256(reading.encode("utf-8", "surrogatepass"))[:_CONTENT]


def _chunks(texts: Mapping[str, str]) -> Iterator[list[str]]:
    """The contents of texts by falling length, cut so that a chunk is neither too many texts nor too much text."""
    chunk: list[str] = []
    characters = 0
    for content in sorted(texts, key=lambda content: -len(texts[content])):
        if chunk and (len(chunk) == CHUNK_TEXTS or characters + len(texts[content]) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(content)
        characters += len(texts[content])
    if chunk:
        yield chunk
