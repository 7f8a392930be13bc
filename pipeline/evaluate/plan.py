"""What the suites and probes will embed and write, told before anything runs; nothing is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate.params import EvaluateParams
from pipeline.tasks.instructions import Instructions, Side, load_instructions, read_changes
from pipeline.tasks.suites import SuiteParams, find_tasks

# How much a suite gives each system to embed, by the statistics that mteb ships with its tasks: nothing is loaded.

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


class EvaluationPlan:
    """The mteb tasks of all suites and probes, by the name of their stage."""

    def __init__(
        self,
        params: EvaluateParams,
        suites: Mapping[str, SuiteParams],
        probes: Mapping[str, Mapping[str, Any]],
        root: Path = Path(),
    ) -> None:
        """Find the tasks, and look that each has an instruction; mteb is imported only where one of its tasks is named.

        Raises:
            EvaluationError: mteb does not know a name, or a task has no instruction.
            ParamsError: evaluate.instructions is missing or has mistakes.
        """
        self._params = params
        self._entries: dict[str, Mapping[str, Any]] = {f"probe@{name}": entry for name, entry in probes.items()}
        self._suites = {f"evaluate@{name}": suite for name, suite in suites.items()}
        self._override = root / params.instructions if params.instructions else None
        instructions = load_instructions(self._override)
        self._tasks = {stage: mteb_tasks(suite.model_dump(), instructions) for stage, suite in self._suites.items()}
        self._tasks |= {stage: mteb_tasks(entry, instructions) for stage, entry in self._entries.items()}

    def lines(self, *, max_tokens: int, answer_tokens: int) -> list[tuple[str, str, str]]:
        """(stage, what, systems) of each suite and probe.

        Args:
            max_tokens: at which the student cuts a text.
            answer_tokens: that hyde's engine writes a query, at most.
        """
        described = {stage: _suite_text(suite) for stage, suite in self._suites.items()}
        described |= {stage: _settings(entry) for stage, entry in self._entries.items()}
        systems = ", ".join(self._params.systems)
        written = answer_tokens if "hyde" in self._params.systems else 0
        return [
            (stage, what + _size_text(size_of(self._tasks[stage], max_tokens), written), systems)
            for stage, what in described.items()
        ]

    def remarks(self) -> list[str]:
        """Entries of evaluate.instructions that nothing here reads."""
        if self._override is None:
            return []
        named = {task.metadata.name for tasks in self._tasks.values() for task in tasks}
        for entry in [*self._entries.values(), *(suite.model_dump() for suite in self._suites.values())]:
            local = entry.get("local") or []
            named |= {Path(name).name for name in ([local] if isinstance(local, str) else local)}
        unread = [name for name in read_changes(self._override).tasks if name not in named]
        file = self._params.instructions
        return [f"evaluate.instructions: {file} names {', '.join(unread)}, in no suite or probe"] if unread else []


def mteb_tasks(entry: Mapping[str, Any], instructions: Instructions) -> list[Any]:
    """The mteb tasks that `tasks` and `benchmark` name, each with an instruction; local ones are not looked for.

    Raises:
        EvaluationError: mteb does not know a name, or a task has no instruction.
    """
    names, benchmark = entry.get("tasks") or [], entry.get("benchmark")
    if not (names or benchmark):
        return []
    tasks = find_tasks([], names, benchmark, entry.get("languages"))
    instructions.check({task.metadata.name: task.metadata.type for task in tasks})
    return tasks


def _size_text(size: SuiteSize, written: int) -> str:
    if not size.tasks:
        return ""
    counted = f" ({len(size.unknown)} not counted)" if size.unknown else ""
    tasks = f"{size.tasks} mteb task{'s' if size.tasks > 1 else ''}{counted}"
    text = f"; {tasks}: {size.texts:,} texts, about {_rough(size.tokens)} tokens a system"
    return f"{text}; hyde writes at most {_rough(size.queries * written)} tokens" if written else text


def _rough(number: int) -> str:
    """Three digits of it, the rest zeros."""
    return f"{round(number, 3 - len(str(number))):,}"


def _suite_text(suite: SuiteParams) -> str:
    named = ", ".join([*suite.local, *suite.tasks, *([suite.benchmark] if suite.benchmark else [])])
    return f"{named}, in {', '.join(suite.languages)} alone" if suite.languages else named


def _settings(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in entry.items() if value not in (None, [], {}))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{value[0]} and {len(value) - 1} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
