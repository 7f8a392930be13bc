"""Which tasks a suite of params.yaml consists of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.errors import EvaluationError
from pipeline.evaluation.local_tasks import local_task
from pipeline.params import Params


class SuiteParams(Params):
    """Local folders, mteb tasks by name, an mteb benchmark: at least one of them."""

    local: list[str] = Field(default_factory=list, description="folders under evaluate.local_dir")
    tasks: list[str] = Field(default_factory=list, description="mteb task names")
    benchmark: str | None = Field(default=None, description="mteb benchmark, e.g. MTEB(eng, v2)")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.local or self.tasks or self.benchmark):
            raise ValueError("names no task: fill local, tasks or benchmark")
        return self


def find_tasks(local: Sequence[Path], names: Sequence[str] = (), benchmark: str | None = None) -> list[Any]:
    """mteb tasks (AbsTask), their data not loaded.

    Raises:
        EvaluationError: mteb does not know a name, a local folder is unusable, or two tasks share a name.
    """
    import mteb

    tasks = [local_task(folder) for folder in local]
    tasks += [_known(mteb.get_task, name, "task") for name in names]
    if benchmark:
        tasks += list(_known(mteb.get_benchmark, benchmark, "benchmark").tasks)
    seen = [task.metadata.name for task in tasks]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise EvaluationError(f"named twice in one suite: {', '.join(twice)}")
    return tasks


def _known(get: Any, name: str, what: str) -> Any:
    try:
        return get(name)
    except (KeyError, ValueError) as error:
        raise EvaluationError(f"mteb has no {what} '{name}': {error.args[0] if error.args else error}") from None
