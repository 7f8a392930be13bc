"""Where a probe's data comes from: a local folder or a hub data set, in retrieval layout or as a plain table.

Retrieval layout has the configs `corpus`, `queries` and `default` (judgements). AdvBench-IR's plain tables have one
harmful request a row with its document (`ID`, `query`, `title`, `document`), or Wikipedia passages (`ID`, `title`,
`passage`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError, describe
from pipeline.tasks.local_dataset import LocalData
from pipeline.tasks.local_tasks import RetrievalData, load_corpus, load_retrieval, only_judged

_ID = ("_id", "id", "ID")
_DOCUMENT = ("document",)
_PASSAGE = ("passage", "text")


class SourceParams(Params):
    """A data set: a folder under evaluate.local_dir, or a hub data set."""

    local: str | None = None
    dataset: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.local is None) == (self.dataset is None):
            raise ValueError("fill exactly one of local and dataset")
        return self


def load_judged(source: SourceParams, local_dir: Path) -> RetrievalData:
    """Queries, passages and judgements of a source; raises EvaluationError if it cannot be loaded or lacks a part."""
    if source.local is not None:
        data = LocalData(local_dir / source.local)
        if not _is_table(data, "document"):
            return load_retrieval(data)
    elif "corpus" in (loader := _hub_loader(str(source.dataset), source.revision)).dataset_configs:
        content = _loading(loader.load, str(source.dataset))
        queries = dict(zip(content["queries"]["id"], content["queries"]["text"], strict=True))
        queries = only_judged(queries, content["relevant_docs"], str(source.dataset))
        return RetrievalData(queries, _hub_corpus(content["corpus"]), content["relevant_docs"], content["top_ranked"])
    return judged_rows(load_rows(source, local_dir, ("query", "document")))


def load_passages(source: SourceParams, local_dir: Path) -> pa.Table:
    """The passages of a source alone: strings `id`, `title`, `text`; raises as `load_judged`."""
    if source.local is not None:
        data = LocalData(local_dir / source.local)
        if not _is_table(data, "passage"):
            return load_corpus(data)
    elif "corpus" in (loader := _hub_loader(str(source.dataset), source.revision)).dataset_configs:
        return _hub_corpus(_loading(lambda: loader._load_corpus(None), str(source.dataset)))
    return corpus_rows(load_rows(source, local_dir, ()), _PASSAGE)


def _is_table(data: LocalData, column: str) -> bool:
    """Whether a folder holds the authors' plain table with this column."""
    return "corpus" not in data.files and "default" in data.files and column in data.columns("default")


def load_rows(source: SourceParams, local_dir: Path, required: Sequence[str]) -> pa.Table:
    """The plain table of a source: its config `default`, the split `test` or the only one; raises alike."""
    if source.local is None:
        return _hub_rows(str(source.dataset), source.revision, required)
    data = LocalData(local_dir / source.local)
    if "default" not in data.files:
        raise EvaluationError(f"{data.folder}: config 'default' missing (it has {sorted(data.files)})")
    return data.read("default", data.split_of("default", "test"), required=required)


def judged_rows(rows: pa.Table) -> RetrievalData:
    """A table of queries with one document each, as retrieval: a document is relevant to its own query only."""
    corpus = corpus_rows(rows, _DOCUMENT)
    ids = corpus["id"].to_pylist()
    queries = dict(zip(ids, rows["query"].to_pylist(), strict=True))
    return RetrievalData(queries, corpus, {name: {name: 1} for name in ids}, None)


def corpus_rows(rows: pa.Table, text_columns: Sequence[str]) -> pa.Table:
    """The passages of a table: strings `id` (its own, or the row's number), `title`, `text`; raises alike."""
    text = next((name for name in text_columns if name in rows.column_names), None)
    if text is None:
        raise EvaluationError(f"passages must be in a column {' or '.join(text_columns)}, not {rows.column_names}")
    key = next((name for name in _ID if name in rows.column_names), None)
    ids = rows[key].cast(pa.string()) if key else pa.array([str(row) for row in range(rows.num_rows)], pa.string())
    if pc.count_distinct(ids).as_py() != rows.num_rows:
        raise EvaluationError(f"an id occurs twice in the column {key} of a table with the column {text}")
    titles = rows["title"] if "title" in rows.column_names else pa.nulls(rows.num_rows, pa.string())
    columns = {"id": ids, "title": titles, "text": rows[text]}
    return pa.table({name: pc.fill_null(column.cast(pa.string()), "") for name, column in columns.items()})


def _hub_loader(name: str, revision: str | None) -> Any:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    return _loading(lambda: RetrievalDatasetLoader(name, revision), name)


def _hub_rows(name: str, revision: str | None, required: Sequence[str]) -> pa.Table:
    import datasets

    splits = _loading(lambda: datasets.get_dataset_split_names(name, revision=revision), name)
    if "test" not in splits and len(splits) > 1:
        raise EvaluationError(f"data set '{name}' has no split 'test' (it has {', '.join(sorted(splits))})")
    split = "test" if "test" in splits else splits[0]
    rows = _loading(lambda: datasets.load_dataset(name, split=split, revision=revision), name)
    missing = [column for column in required if column not in rows.column_names]
    if missing:
        raise EvaluationError(f"data set '{name}': columns {missing} missing (it has {rows.column_names})")
    return rows.with_format("arrow")[:]


def _loading(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"data set '{name}' cannot be loaded: {describe(error)}") from None


def _hub_corpus(corpus: Any) -> pa.Table:
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
    columns = {"id": corpus["id"], "title": titles, "text": corpus["text"]}
    return pa.table({name: pa.array([text or "" for text in texts], pa.string()) for name, texts in columns.items()})
