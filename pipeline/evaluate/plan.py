"""What each suite and probe will embed, known before anything runs.

Sizes come from the statistics that mteb ships with its tasks; no data and no model is loaded.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate.params import EvaluateParams
from pipeline.optim.batching import CHARACTERS_PER_TOKEN
from pipeline.tasks.instructions import Instructions, Side, load_instructions, read_changes
from pipeline.tasks.suites import SuiteParams, find_tasks

_DOCUMENTS = "documents_text_statistics"


class EvaluationPlan:
    """The mteb tasks of all suites and probes, by the name of their stage."""

    def __init__(
        self,
        params: EvaluateParams,
        suites: Mapping[str, SuiteParams],
        probes: Mapping[str, Mapping[str, Any]],
        root: Path = Path(),
    ) -> None:
        """Find the tasks and check that each has an instruction; mteb is imported only if one of its tasks is named.

        Raises EvaluationError if mteb does not know a name or a task has no instruction, ParamsError for the
        instructions file.
        """
        self._systems, self._file = params.systems, params.instructions
        self._changes = root / params.instructions if params.instructions else None
        instructions = load_instructions(self._changes)
        self._entries: dict[str, Mapping[str, Any]] = {
            f"evaluate@{name}": suite.model_dump() for name, suite in suites.items()
        }
        self._described = {f"evaluate@{name}": _suite_text(suite) for name, suite in suites.items()}
        self._entries |= {f"probe@{name}": entry for name, entry in probes.items()}
        self._described |= {f"probe@{name}": _settings(entry) for name, entry in probes.items()}
        self._tasks = {stage: mteb_tasks(entry, instructions) for stage, entry in self._entries.items()}

    def lines(self, *, max_tokens: int, answer_tokens: int) -> list[tuple[str, str, str]]:
        """(stage, tasks and size, systems) of each suite and probe.

        The student cuts texts at `max_tokens`; hyde's engine writes at most `answer_tokens` for a query.
        """
        written = answer_tokens if "hyde" in self._systems else 0
        return [
            (stage, what + _size_text(size_of(self._tasks[stage], max_tokens), written), ", ".join(self._systems))
            for stage, what in self._described.items()
        ]

    def sizes(self, max_tokens: int) -> "dict[str, SuiteSize]":
        """What a system that cuts texts at `max_tokens` reads in each suite and probe that has tasks of mteb."""
        return {stage: size_of(tasks, max_tokens) for stage, tasks in self._tasks.items() if tasks}

    def remarks(self) -> list[str]:
        """Entries of evaluate.instructions that no suite or probe uses."""
        if self._changes is None:
            return []
        named = {task.metadata.name for tasks in self._tasks.values() for task in tasks}
        for entry in self._entries.values():
            local = entry.get("local") or []
            named |= {Path(name).name for name in ([local] if isinstance(local, str) else local)}
        unused = [name for name in read_changes(self._changes).tasks if name not in named]
        where = f"evaluate.instructions: {self._file}"
        return [f"{where} names {', '.join(unused)}, in no suite or probe"] if unused else []


def mteb_tasks(entry: Mapping[str, Any], instructions: Instructions) -> list[Any]:
    """The mteb tasks that `tasks` and `benchmark` name, each with an instruction; local ones are ignored.

    Raises EvaluationError if mteb does not know a name, or a task has no instruction.
    """
    names, benchmark = entry.get("tasks") or [], entry.get("benchmark")
    if not (names or benchmark):
        return []
    tasks = find_tasks([], names, benchmark, entry.get("languages"))
    instructions.check({task.metadata.name: task.metadata.type for task in tasks})
    return tasks


# --- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuiteSize:
    """Texts of a suite, counted once within each task and side; tasks without documents have queries alone.

    `tokens` assumes four characters each, cut at the limit: an upper bound for English; `document_tokens` are those of
    the documents. `unknown` tasks are not counted.
    """

    tasks: int
    queries: int
    documents: int
    tokens: int
    document_tokens: int
    unknown: tuple[str, ...]

    @property
    def texts(self) -> int:
        return self.queries + self.documents


def size_of(tasks: Iterable[Any], max_tokens: int) -> SuiteSize:
    """The size of mteb tasks for a system that cuts texts at `max_tokens`; classifications' examples are left out."""
    tasks, unknown = list(tasks), []
    counts: Counter[str] = Counter()
    for part in (part for task in tasks for part in getattr(task.metadata, "tasks", None) or [task]):
        columns = list(_text_columns(part))
        if not columns:
            unknown.append(part.metadata.name)
        for side, texts, length in columns:
            tokens = round(texts * min(length / CHARACTERS_PER_TOKEN, max_tokens))
            counts += Counter({side: texts, "tokens": tokens, f"{side} tokens": tokens})
    queries, documents = counts["query"], counts["document"]
    return SuiteSize(len(tasks), queries, documents, counts["tokens"], counts["document tokens"], tuple(unknown))


def _text_columns(task: Any) -> Iterator[tuple[Side, int, float]]:
    """(side, distinct texts, their mean length in characters) of each column of texts that is embedded."""
    statistics = task.metadata.descriptive_stats or {}
    for split in task.eval_splits:
        for subset in _evaluated(task, statistics.get(split) or {}):
            for key, column in subset.items():
                if isinstance(column, Mapping) and column.get("unique_texts"):
                    side: Side = "document" if key == _DOCUMENTS else "query"
                    yield side, column["unique_texts"], column["average_text_length"]


def _evaluated(task: Any, split: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The whole split, or those of its subsets that the task runs."""
    subsets = split.get("hf_subset_descriptive_stats") or {}
    if not subsets or set(task.hf_subsets) >= set(subsets):
        return [split]
    return [subsets[name] for name in task.hf_subsets if name in subsets]


# --- text -----------------------------------------------------------------------------------------------------------


def _size_text(size: SuiteSize, written: int) -> str:
    if not size.tasks:
        return ""
    unknown = f" ({len(size.unknown)} not counted)" if size.unknown else ""
    tasks = f"{size.tasks} mteb task{'s' if size.tasks > 1 else ''}{unknown}"
    text = f"; {tasks}: {size.texts:,} texts, about {_rounded(size.tokens)} tokens a system"
    return f"{text}; hyde writes at most {_rounded(size.queries * written)} tokens" if written else text


def _rounded(number: int) -> str:
    return f"{round(number, 3 - len(str(number))):,}"


def _suite_text(suite: SuiteParams) -> str:
    names = ", ".join([*suite.local, *suite.tasks, *([suite.benchmark] if suite.benchmark else [])])
    return f"{names}, in {', '.join(suite.languages)} alone" if suite.languages else names


def _settings(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in entry.items() if value not in (None, [], {}))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{value[0]} and {len(value) - 1} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
