"""Passages to search and the search itself, exact and in one pass over a corpus of any size."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from pydantic import model_validator

from pipeline.errors import EvaluationError
from pipeline.evaluation.local_data import LocalData
from pipeline.evaluation.local_tasks import RetrievalData, load_corpus, load_retrieval
from pipeline.params import Params

if TYPE_CHECKING:
    from pipeline.evaluation.systems import System

CHUNK = 8192


class SourceParams(Params):
    """A data set in retrieval layout: a folder under evaluate.local_dir, or a hub data set."""

    local: str | None = None
    dataset: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.local is None) == (self.dataset is None):
            raise ValueError("fill exactly one of local and dataset")
        return self


def load_judged(source: SourceParams, local_dir: Path) -> RetrievalData:
    """Queries, passages and judgements of a source.

    Raises:
        EvaluationError: it cannot be loaded or lacks a part.
    """
    if source.local is not None:
        return load_retrieval(LocalData(local_dir / source.local))
    return _from_hub(str(source.dataset), source.revision)


def load_passages(source: SourceParams, local_dir: Path) -> pa.Table:
    """The passages of a source alone: strings `id`, `title`, `text`.

    Raises:
        EvaluationError: it cannot be loaded or has no corpus.
    """
    if source.local is not None:
        return load_corpus(LocalData(local_dir / source.local))
    return _hub_corpus(_hub_loader(str(source.dataset), source.revision), str(source.dataset))


def _from_hub(name: str, revision: str | None) -> RetrievalData:
    loader = _hub_loader(name, revision)
    content = _loading(loader.load, name)
    queries = dict(zip(content["queries"]["id"], content["queries"]["text"], strict=True))
    return RetrievalData(queries, _as_table(content["corpus"]), content["relevant_docs"], content["top_ranked"])


def _hub_corpus(loader: Any, name: str) -> pa.Table:
    return _as_table(_loading(lambda: loader._load_corpus(None), name))


def _hub_loader(name: str, revision: str | None) -> Any:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    return _loading(lambda: RetrievalDatasetLoader(name, revision), name)


def _loading(load: Any, name: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"data set '{name}' cannot be loaded: {str(error).splitlines()[0]}") from None


def _as_table(corpus: Any) -> pa.Table:
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
    texts = {"id": corpus["id"], "title": titles, "text": corpus["text"]}
    return pa.table({name: pa.array([value or "" for value in column], pa.string()) for name, column in texts.items()})


def search(
    system: "System", queries: np.ndarray, passages: Sequence[str], instruction: str, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The passages nearest to each query by cosine.

    Args:
        system: embeds the passages, chunk by chunk.
        queries: float32 [Q, d].
        passages: N texts.
        instruction: for the passages.
        top: how many to keep.

    Returns:
        Positions int64 [Q, min(top, N)] and cosines float32 of the same shape, best first; on a tie
        the earlier passage.
    """
    unit = unit_rows(queries)
    positions = np.empty((len(queries), 0), dtype=np.int64)
    cosines = np.empty((len(queries), 0), dtype=np.float32)
    for start in range(0, len(passages), CHUNK):
        chunk = passages[start : start + CHUNK]
        scores = unit @ unit_rows(system.encode(chunk, instruction)).T
        numbers = np.broadcast_to(np.arange(start, start + len(chunk)), scores.shape)
        cosines, positions = np.hstack([cosines, scores]), np.hstack([positions, numbers])
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        cosines, positions = np.take_along_axis(cosines, best, 1), np.take_along_axis(positions, best, 1)
    return positions, cosines


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 [N, d]; a zero row stays zero.

    Raises:
        EvaluationError: a value is not finite.
    """
    if not np.isfinite(vectors).all():
        raise EvaluationError(f"{int((~np.isfinite(vectors).all(axis=1)).sum())} embeddings are not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
