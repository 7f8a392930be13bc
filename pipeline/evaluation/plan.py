"""What the suites and probes will embed and write, told before anything runs; nothing is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.instructions import Instructions, load_instructions, read_changes
from pipeline.evaluation.params import EvaluateParams
from pipeline.evaluation.sizes import SuiteSize, size_of
from pipeline.evaluation.suites import SuiteParams, find_tasks


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
