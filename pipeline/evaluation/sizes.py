"""How much a suite gives each system to embed, by the statistics that mteb ships with its tasks: nothing is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.prompts import Side

CHARACTERS_A_TOKEN = 4  # of English; other scripts have fewer

_DOCUMENTS = "documents_text_statistics"


@dataclass(frozen=True)
class SuiteSize:
    """Texts that differ within their task and side, in all tasks of a suite.

    Attributes:
        tasks: how many there are.
        queries: texts on the query side, to which all texts of tasks without documents belong.
        documents: texts on the document side.
        tokens: of both, at four characters each and cut at the limit: an upper bound of English, a rough one of others.
        unknown: names of the tasks that have no statistics and are not counted.
    """

    tasks: int
    queries: int
    documents: int
    tokens: int
    unknown: tuple[str, ...]

    @property
    def texts(self) -> int:
        """Both sides."""
        return self.queries + self.documents


def size_of(tasks: Iterable[Any], max_tokens: int) -> SuiteSize:
    """The size of mteb tasks (AbsTask) for a system that cuts texts at `max_tokens`.

    The few training examples of classifications are not counted.
    """
    count = queries = documents = tokens = 0
    unknown = []
    for task in tasks:
        count += 1
        for part in getattr(task.metadata, "tasks", None) or [task]:
            found = list(_statistics(part))
            if not found:
                unknown.append(part.metadata.name)
            for side, texts, length in found:
                queries, documents = queries + texts * (side == "query"), documents + texts * (side == "document")
                tokens += round(texts * min(length / CHARACTERS_A_TOKEN, max_tokens))
    return SuiteSize(count, queries, documents, tokens, tuple(unknown))


def _statistics(task: Any) -> Iterable[tuple[Side, int, float]]:
    """(side, unique texts, their mean length in characters) of each column of texts that is embedded."""
    statistics = task.metadata.descriptive_stats or {}
    for split in task.eval_splits:
        if split in statistics:
            for entry in _entries(task, statistics[split]):
                yield from _columns(entry)


def _entries(task: Any, split: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The whole split, or those of its subsets that the task runs."""
    subsets = split.get("hf_subset_descriptive_stats") or {}
    if not subsets or set(task.hf_subsets) >= set(subsets):
        return [split]
    return [subsets[name] for name in task.hf_subsets if name in subsets]


def _columns(entry: Mapping[str, Any]) -> Iterable[tuple[Side, int, float]]:
    for key, column in entry.items():
        if isinstance(column, Mapping) and column.get("unique_texts"):
            side: Side = "document" if key == _DOCUMENTS else "query"
            yield side, column["unique_texts"], column["average_text_length"]
