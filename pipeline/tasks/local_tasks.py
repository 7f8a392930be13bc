"""Local folders as mteb tasks, recognised by their layout:

| layout         | configs                                    | columns                                              |
|----------------|--------------------------------------------|------------------------------------------------------|
| Retrieval      | corpus, queries, default (or qrels);       | `_id`, `text` (corpus also `title`); `query-id`,     |
|                | optionally top_ranked; BEIR's own folders  | `corpus-id`, `score`; `query-id`, `corpus-ids`       |
| STS            | default                                    | `sentence1`, `sentence2`, `score`                    |
| Classification | default, splits train and test             | `text`, `label`                                      |
| Choices        | default                                    | `question`, `choices`, `answer`, see choices.py      |

Choices become retrieval, scored by nDCG@10: all choices of all questions are the corpus. The test split counts, or the
only split there is. The task is named like the folder; its data revision is a hash of the files.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import EvaluationError
from pipeline.tasks.choices import CHOICE_ACCURACY, ChoiceColumns, choice_accuracy, choice_columns, read_choices
from pipeline.tasks.local_dataset import LocalData

log = logging.getLogger(__name__)

_PAIR = ("sentence1", "sentence2", "score")
_LABELLED = ("text", "label")
_JUDGEMENT = ("query-id", "corpus-id", "score")
_MAIN_SCORES = {"Retrieval": "ndcg_at_10", "STS": "cosine_spearman", "Classification": "accuracy"}


def local_task(folder: Path) -> Any:
    """The mteb task (AbsTask) in a folder; its tables are read when mteb asks for them.

    Raises:
        EvaluationError: the folder has none of the layouts, or a table lacks a column.
    """
    data = LocalData(folder)
    layout = layout_of(data)
    match layout:
        case "Retrieval":
            return _task(data, layout, retrieval_split(data), lambda: load_retrieval(data).as_mteb())
        case "STS":
            split = data.split_of("default", "test")
            return _task(data, layout, split, lambda: _dataset_dict({split: _pairs(data, split)}))
        case "Choices":
            return _choice_task(data, data.split_of("default", "test"))
        case _:
            return _task(data, layout, "test", lambda: _classification(data))


def layout_of(data: LocalData) -> str:
    """The layout of a folder's configs and columns: a task type of mteb, or Choices; EvaluationError without one."""
    if {"corpus", "queries"} <= set(data.files):
        return "Retrieval"
    columns = set(data.columns("default")) if "default" in data.files else set()
    if set(_PAIR) <= columns:
        return "STS"
    if set(_LABELLED) <= columns:
        return "Classification"
    if choice_columns(columns) is not None:
        return "Choices"
    raise EvaluationError(
        f"{data.folder}: unknown layout: configs {sorted(data.files)}, columns of 'default' {sorted(columns)}; must be "
        "retrieval (configs corpus, queries, default), STS (columns sentence1, sentence2, score), "
        "classification (columns text, label; splits train, test) or choices (columns question, choices, answer)"
    )


@dataclass(frozen=True)
class RetrievalData:
    """Queries, passages and judgements of one retrieval task.

    Attributes:
        queries: text by id, only those with a judgement.
        corpus: as of `load_corpus`.
        relevant: for each query id, the relevance by passage id.
        top_ranked: for each query id, the passages to rank; None = all of the corpus.
    """

    queries: dict[str, str]
    corpus: pa.Table
    relevant: dict[str, dict[str, int]]
    top_ranked: dict[str, list[str]] | None

    def as_mteb(self) -> dict[str, Any]:
        """mteb's RetrievalSplitData."""
        from datasets import Dataset

        queries = pa.table({"id": list(self.queries), "text": list(self.queries.values())})
        return {
            "corpus": Dataset(self.corpus),
            "queries": Dataset(queries),
            "relevant_docs": self.relevant,
            "top_ranked": self.top_ranked,
        }


def retrieval_split(data: LocalData) -> str:
    """The split of the judgements that counts."""
    return data.split_of(_judgements_config(data), "test")


def load_retrieval(data: LocalData) -> RetrievalData:
    """The tables of a folder in retrieval layout.

    Raises:
        EvaluationError: a config, column or row is missing, or a judgement names an unknown id.
    """
    if layout_of(data) != "Retrieval":
        raise EvaluationError(f"{data.folder}: must have the retrieval layout (configs corpus, queries, default)")
    relevant = _judgements(data)
    corpus = load_corpus(data)
    texts = _identified(data, "queries", ("text",))
    queries = dict(zip(texts["id"].to_pylist(), texts["text"].to_pylist(), strict=True))
    passages = set(corpus["id"].to_pylist())
    _check_known(data, relevant, "queries", queries)
    _check_known(data, (passage for scores in relevant.values() for passage in scores), "corpus", passages)
    judged = only_judged(queries, relevant, str(data.folder))
    top_ranked = _top_ranked(data)
    if top_ranked is not None:
        _check_known(
            data, (passage for names in top_ranked.values() for passage in names), "corpus", passages, "top_ranked"
        )
        _check_known(data, judged, "top_ranked", top_ranked)
    return RetrievalData(judged, corpus, relevant, top_ranked)


def only_judged(queries: Mapping[str, str], relevant: Mapping[str, Any], name: str) -> dict[str, str]:
    """The queries with a judgement; a warning counts the others, which no score can count."""
    judged = {query: text for query, text in queries.items() if relevant.get(query)}
    if len(judged) < len(queries):
        first = next(query for query in queries if query not in judged)
        left_out = len(queries) - len(judged)
        log.info(
            "%s: %d of %d queries have no judgement and are left out, first '%s'", name, left_out, len(queries), first
        )
    if not judged:
        raise EvaluationError(f"{name}: none of its {len(queries)} queries has a judgement")
    return judged


def _judgements(data: LocalData) -> dict[str, dict[str, int]]:
    """Relevance by query and passage: whole numbers, one for each pair."""
    config, split = _judgements_config(data), retrieval_split(data)
    table = data.read(config, split, required=_JUDGEMENT[:2], numbers=_JUDGEMENT[2:])
    where = f"{data.folder}: config '{config}', split '{split}'"
    relevant: dict[str, dict[str, int]] = {}
    for row, (query, passage, score) in enumerate(zip(*(table[name].to_pylist() for name in _JUDGEMENT), strict=True)):
        if not score.is_integer():
            limit = "relevance must be a whole number, as nDCG and the other scores need it: scale or round it"
            raise EvaluationError(f"{where}, row {row}: the score {score} of '{query}' and '{passage}': {limit}")
        scores = relevant.setdefault(str(query), {})
        if str(passage) in scores:
            raise EvaluationError(f"{where}, row {row}: '{query}' and '{passage}' are judged a second time")
        scores[str(passage)] = int(score)
    return relevant


def _judgements_config(data: LocalData) -> str:
    for config in ("default", "qrels"):
        if config in data.files:
            return config
    raise EvaluationError(f"{data.folder}: retrieval layout without judgements: add a config 'default'")


def load_corpus(data: LocalData) -> pa.Table:
    """The passages of a folder in retrieval layout: strings `id`, `title` (empty where there is none), `text`.

    Raises:
        EvaluationError: a column is missing or an id occurs twice.
    """
    return _identified(data, "corpus", ("title", "text"))


def _identified(data: LocalData, config: str, columns: Sequence[str]) -> pa.Table:
    if config not in data.files:
        raise EvaluationError(f"{data.folder}: config '{config}' missing (it has {sorted(data.files)})")
    table = data.read(config, data.split_of(config, "test"), texts=["text"], optional=["title"])
    key = next((name for name in ("_id", "id") if name in table.column_names), None)
    if key is None:
        raise EvaluationError(f"{data.folder}: config '{config}': column '_id' missing (it has {table.column_names})")
    texts = {"id": table[key].cast(pa.string())}
    for column in columns:
        found = table[column] if column in table.column_names else pa.nulls(table.num_rows)
        texts[column] = pc.fill_null(found.cast(pa.string()), "")
    if pc.count_distinct(texts["id"]).as_py() != table.num_rows:
        raise EvaluationError(f"{data.folder}: config '{config}': an id occurs twice")
    return pa.table(texts)


def _check_known(data: LocalData, used: Any, config: str, known: Any, by: str = "judgements") -> None:
    unknown = sorted({name for name in used if name not in known})
    if unknown:
        raise EvaluationError(
            f"{data.folder}: {by} name {len(unknown)} ids that config '{config}' lacks, first: '{unknown[0]}'"
        )


def _top_ranked(data: LocalData) -> dict[str, list[str]] | None:
    if "top_ranked" not in data.files:
        return None
    table = data.read("top_ranked", data.split_of("top_ranked", "test"), required=["query-id", "corpus-ids"])
    pairs = zip(table["query-id"].to_pylist(), table["corpus-ids"].to_pylist(), strict=True)
    return {str(query): [str(passage) for passage in passages] for query, passages in pairs}


def load_choices(data: LocalData) -> tuple[RetrievalData, list[list[str]]]:
    """Questions with choices as retrieval, and for each question the passage ids of its own choices.

    All choices of all questions are the corpus, equal ones once; a question's right choice is relevant to it.

    Raises:
        EvaluationError: a column or row is malformed.
    """
    columns = choice_columns(data.columns("default")) or ChoiceColumns()
    table = data.read("default", data.split_of("default", "test"), required=columns)
    questions = read_choices(table, columns, where=str(data.folder))
    ids: dict[str, str] = {}
    own = [[ids.setdefault(choice, f"c{len(ids)}") for choice in question.choices] for question in questions]
    corpus = pa.table({"id": list(ids.values()), "title": [""] * len(ids), "text": list(ids)})
    queries = {f"q{row}": question.text for row, question in enumerate(questions)}
    rights = {f"q{row}": {own[row][question.right]: 1} for row, question in enumerate(questions)}
    return RetrievalData(queries, corpus, rights, None), own


def _classification(data: LocalData) -> Any:
    splits = data.files["default"]
    if not {"train", "test"} <= set(splits):
        raise EvaluationError(f"{data.folder}: classification needs the splits train and test, it has {sorted(splits)}")
    tables = {split: data.read("default", split, texts=["text"], required=["label"]) for split in ("train", "test")}
    if len(tables["train"]["label"].unique()) < 2:
        raise EvaluationError(f"{data.folder}: config 'default', split 'train': a classifier needs two labels at least")
    labels = {label for table in tables.values() for label in table["label"].to_pylist()}
    names = sorted(labels, key=lambda label: (isinstance(label, str), label))
    codes = {name: code for code, name in enumerate(names)}
    return _dataset_dict(
        {
            split: pa.table({"text": table["text"], "label": [codes[label] for label in table["label"].to_pylist()]})
            for split, table in tables.items()
        }
    )


def _pairs(data: LocalData, split: str) -> pa.Table:
    table = data.read("default", split, texts=_PAIR[:2], numbers=_PAIR[2:]).select(_PAIR)
    if table.num_rows < 2:
        raise EvaluationError(
            f"{data.folder}: config 'default', split '{split}': a correlation needs two pairs at least"
        )
    return table


def _dataset_dict(tables: dict[str, pa.Table]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset(table) for split, table in tables.items()})


def _task(
    data: LocalData,
    layout: str,
    split: str,
    load: Callable[[], Any],
    specific: Callable[[Any, Any], dict[str, float]] = lambda qrels, results: {},
) -> Any:
    """`specific` gives further scores of a retrieval task from its judgements and mteb's results."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS

    base = {"Retrieval": AbsTaskRetrieval, "STS": AbsTaskSTS, "Classification": AbsTaskClassification}[layout]

    class LocalTask(base):  # type: ignore[misc, valid-type]
        """A local folder as mteb sees it."""

        metadata = _metadata(data, layout, split)

        def load_data(self, **_: Any) -> None:
            """Read the folder's tables."""
            content = load()
            self.dataset = {"default": {split: content}} if layout == "Retrieval" else content
            self.data_loaded = True

        def task_specific_scores(self, scores: Any, qrels: Any, results: Any, **_: Any) -> dict[str, float]:
            """mteb asks retrieval tasks for them."""
            return specific(qrels, results)

    return LocalTask()


def _choice_task(data: LocalData, split: str) -> Any:
    own: dict[str, list[str]] = {}

    def load() -> Any:
        content, choices = load_choices(data)
        own.update(zip(content.queries, choices, strict=True))
        return content.as_mteb()

    def specific(qrels: Any, results: Any) -> dict[str, float]:
        return {CHOICE_ACCURACY: choice_accuracy(own, qrels, results)}

    return _task(data, "Retrieval", split, load, specific)


def _metadata(data: LocalData, layout: str, split: str) -> Any:
    from mteb import TaskMetadata

    return TaskMetadata(
        name=data.name,
        description=f"Local folder {data.name}",
        dataset={"path": data.name, "revision": data.revision},
        type=layout,
        category="t2c" if layout == "Classification" else "t2t",
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score=_MAIN_SCORES[layout],
    )
