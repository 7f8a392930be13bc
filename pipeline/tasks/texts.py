"""All texts that an evaluation reads, streamed: for keeping them out of the training queries.

Queries, passages, sentences, choices and summaries count, of every split that is loaded; ids, labels and scores do not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import EvaluationError, first_line
from pipeline.core.readers import read_batches
from pipeline.tasks.local_dataset import LocalData, evaluation_files
from pipeline.tasks.suites import SuiteParams, find_tasks

BATCH = 2048
_NO_TEXT = {
    *("id", "_id", "query-id", "query_id", "corpus-id", "corpus_id", "corpus-ids"),
    *("answer_class", "answer_index", "answerKey", "label", "labels", "label_text", "score", "scores"),
    *("category", "role", "type", "lang", "language", "subset", "split", "url"),
}
_NO_TABLES = ("relevant_docs", "top_ranked")


@dataclass(frozen=True)
class TextSource:
    """The texts of a task, folder or hub data set; no `revision` where nothing pins them."""

    name: str
    revision: str | None
    batches: Callable[[], Iterator[list[str]]]


def find_texts(
    suites: Mapping[str, SuiteParams], probes: Mapping[str, Mapping[str, Any]], local_dir: Path
) -> list[TextSource]:
    """The data of all suites and probes, each once; nothing is read yet.

    Probes name their data by the keys `local`, `tasks`, `dataset` and `revision`, on any level of their entry.

    Raises:
        EvaluationError: a folder is missing or malformed, or mteb does not know a name.
    """
    entries: list[Mapping[str, Any]] = [suite.model_dump() for suite in suites.values()]
    for probe in probes.values():
        entries += _levels(probe)
    found: dict[tuple[str, str | None], TextSource] = {}
    for entry in entries:
        for source in _sources_of(entry, local_dir):
            found.setdefault((source.name, source.revision), source)
    return list(found.values())


def _levels(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield entry
    for value in entry.values():
        if isinstance(value, Mapping):
            yield from _levels(value)


def _sources_of(entry: Mapping[str, Any], local_dir: Path) -> Iterator[TextSource]:
    for name in _listed(entry.get("local")):
        yield _folder(name, LocalData(local_dir / name))
    if entry.get("dataset"):
        yield _dataset(str(entry["dataset"]), entry.get("revision"))
    names, benchmark = _listed(entry.get("tasks")), entry.get("benchmark")
    if names or benchmark:  # mteb is heavy
        for task in find_tasks([], names, benchmark, entry.get("languages")):
            yield from map(_task, getattr(task.metadata, "tasks", None) or [task])


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


# --- local folders --------------------------------------------------------------------------------------------------


def _folder(name: str, data: LocalData) -> TextSource:
    def batches() -> Iterator[list[str]]:
        paths = {path for splits in data.files.values() for paths in splits.values() for path in paths}
        with evaluation_files():
            for path in sorted(paths):
                for columns in read_batches(path, BATCH, without=_NO_TEXT):
                    yield list(_strings([*columns.values()]))

    return TextSource(name, data.revision, batches)


# --- mteb and the hub -----------------------------------------------------------------------------------------------


def _task(task: Any) -> TextSource:
    def load() -> Any:
        task.load_data()
        if hasattr(task, "convert_v1_dataset_format_to_v2"):
            task.convert_v1_dataset_format_to_v2(num_proc=None)
        return task.dataset

    def batches() -> Iterator[list[str]]:
        yield from _loaded(load, task.metadata.name)
        task.unload_data()

    return TextSource(task.metadata.name, task.metadata.dataset.get("revision"), batches)


def _dataset(name: str, revision: str | None) -> TextSource:
    def load() -> Any:
        import datasets

        configs = datasets.get_dataset_config_names(name, revision=revision)
        return {config: datasets.load_dataset(name, config, revision=revision) for config in configs}

    return TextSource(name, revision, lambda: _loaded(load, name))


def _loaded(load: Callable[[], Any], name: str) -> Iterator[list[str]]:
    try:
        data = load()
    except EvaluationError:
        raise
    # The libraries raise whatever the network, the cache or the files give them; all of it is about this data.
    except Exception as error:
        reason = first_line(error)
        raise EvaluationError(f"{name}: {reason}") from None
    count = 0
    for texts in _tables(data):
        count += len(texts)
        yield texts
    if not count:
        raise EvaluationError(f"{name}: no text was found in its data, so no query can be compared with it")


def _tables(data: Any) -> Iterator[list[str]]:
    """The texts of the data sets in nested dicts, batch by batch."""
    from datasets import Dataset

    if isinstance(data, Mapping):
        for key, value in data.items():
            if key not in _NO_TABLES:
                yield from _tables(value)
    elif isinstance(data, Dataset):
        columns = [name for name in data.column_names if name not in _NO_TEXT]
        if columns:
            for batch in data.select_columns(columns).with_format("arrow").iter(BATCH):
                yield [text for name in columns for text in _strings(batch.column(name).to_pylist())]


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value of any depth."""
    match value:
        case str():
            yield value
        case list() | tuple():
            for item in value:
                yield from _strings(item)
        case dict():
            for key, item in value.items():
                if key not in _NO_TEXT:
                    yield from _strings(item)
