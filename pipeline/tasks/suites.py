"""Which tasks a suite of params.yaml consists of."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, RootModel, model_validator

from pipeline.core.config import Params, read_yaml, validate
from pipeline.core.errors import EvaluationError, nested_in, section
from pipeline.tasks.local_tasks import local_task

log = logging.getLogger(__name__)

SUITES_FILE = Path(__file__).with_name("suites.yaml")


class SuiteParams(Params):
    """Local folders, mteb tasks by name, a benchmark: at least one of them."""

    local: list[str] = Field(default_factory=list, description="folders under local_dir")
    tasks: list[str] = Field(default_factory=list, description="mteb task names")
    benchmark: str | None = Field(default=None, description="of mteb, e.g. MTEB(eng, v2), or of suites.yaml: MTEB-Lite")
    languages: list[str] | None = Field(
        default=None,
        min_length=1,
        description="ISO 639-3, e.g. [eng, deu]: mteb's subsets in other languages do not run",
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.local or self.tasks or self.benchmark):
            raise ValueError("names no task: fill local, tasks or benchmark")
        return self


class NamedSuite(Params):
    """Some tasks of an mteb benchmark, with its splits and subsets."""

    benchmark: str
    tasks: list[str] = Field(min_length=1)


class _NamedSuites(RootModel[dict[str, NamedSuite]]):
    pass


def named_suites() -> dict[str, NamedSuite]:
    """The suites of suites.yaml by name."""
    return validate(read_yaml(SUITES_FILE), _NamedSuites, where=SUITES_FILE.name).root


def find_tasks(
    local: Sequence[Path],
    names: Sequence[str] = (),
    benchmark: str | None = None,
    languages: Sequence[str] | None = None,
) -> list[Any]:
    """mteb tasks (AbsTask), their data not loaded.

    Args:
        local: folders.
        names: of mteb tasks.
        benchmark: of mteb, or of suites.yaml.
        languages: subsets of mteb's tasks remain whose languages are all among them; None: all subsets.

    Raises:
        EvaluationError: mteb does not know a name or a language, a local folder is unusable, two tasks share a name,
            or a task is not about text alone.
    """
    tasks = [local_task(folder) for folder in local]
    tasks += _in_languages([_task(name) for name in names], languages, "tasks")
    if benchmark:
        tasks += _in_languages(_benchmark(benchmark), languages, benchmark)
    seen = [task.metadata.name for task in tasks]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise EvaluationError(f"named twice in one suite: {', '.join(twice)}")
    _check_text_only(tasks)
    return tasks


def suite_tasks(suites: Mapping[str, SuiteParams], name: str, local_dir: Path) -> list[Any]:
    """The tasks of the entry `name` of the section `suites`, see `find_tasks`; its folders lie in `local_dir`.

    Raises EvaluationError as `find_tasks` does.
    """
    suite = suites[name]
    with section("suites"), nested_in(name):
        return find_tasks([local_dir / folder for folder in suite.local], suite.tasks, suite.benchmark, suite.languages)


def _benchmark(name: str) -> list[Any]:
    named = named_suites().get(name)
    if named is None:
        return _mteb_benchmark(name)
    by_name = {task.metadata.name: task for task in _mteb_benchmark(named.benchmark)}
    unknown = [task for task in named.tasks if task not in by_name]
    if unknown:
        raise EvaluationError(f"{SUITES_FILE.name}: {name}: {named.benchmark} has no task {', '.join(unknown)}")
    return [by_name[task] for task in named.tasks]


def _mteb_benchmark(name: str) -> list[Any]:
    import mteb

    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        raise EvaluationError(
            f"mteb has no benchmark '{name}': {error.args[0]} ({SUITES_FILE.name} has: {', '.join(named_suites())})"
        ) from None


def _task(name: str) -> Any:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise EvaluationError(f"mteb has no task '{name}': {error.args[0]}") from None


def _in_languages(tasks: list[Any], languages: Sequence[str] | None, of: str) -> list[Any]:
    """Copies of the tasks that have a subset in the languages, with those subsets alone; the rest is logged."""
    if languages is None or not tasks:
        return tasks
    _check_languages(languages)
    chosen, left_out = [], []
    for task in map(copy.deepcopy, tasks):  # a benchmark's tasks are shared by all who ask for it
        try:
            subsets = set(task.hf_subsets)  # thousands in some
            chosen.append(task.filter_languages(languages, hf_subsets=subsets, exclusive_language_filter=True))
        except ValueError:  # no subset remains
            left_out.append(task.metadata.name)
    if not chosen:
        raise EvaluationError(f"no subset of {of} is in {', '.join(languages)} alone", argument="languages")
    if left_out:
        log.info("%s: %d tasks are not in %s: %s", of, len(left_out), ", ".join(languages), ", ".join(left_out))
    return chosen


def _check_languages(languages: Sequence[str]) -> None:
    from mteb.languages import check_language_code

    for language in languages:
        try:
            check_language_code(language)
        except ValueError:
            raise EvaluationError(
                f"'{language}' is no ISO 639-3 code, e.g. eng or eng-Latn", argument="languages"
            ) from None


def _check_text_only(tasks: Sequence[Any]) -> None:
    others = {task.metadata.name: sorted({*task.metadata.modalities} - {"text"}) for task in tasks}
    lines = [f"  {name} ({', '.join(found)})" for name, found in others.items() if found]
    if lines:
        raise EvaluationError(f"{len(lines)} of {len(tasks)} tasks are not about text alone:\n" + "\n".join(lines))
