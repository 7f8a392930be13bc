"""Whether the data of all tasks can be loaded, known before any of them runs.

`datasets` serves what it has in its cache when it cannot reach the hub, whatever revision that is; so after a task's
data has been loaded, its revision must be in the cache.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import EvaluationError, PipelineError, first_line
from pipeline.core.run import progress

log = logging.getLogger(__name__)


class MissingData(NamedTuple):
    """Data of an mteb task that cannot be loaded: the hub's data set and revision, and the reason in one line."""

    task: str
    source: str
    reason: str


def check_data(tasks: Sequence[Any]) -> None:
    """Load the data of each mteb task once, and drop it again.

    Raises:
        EvaluationError: with every task whose data cannot be loaded, and how to fetch it.
    """
    parts = [part for task in tasks for part in getattr(task.metadata, "tasks", None) or [task]]
    missing: list[MissingData] = []
    for part in progress(parts, total=len(parts), desc="data of the tasks", unit="task"):
        if found := _missing(part):
            if not missing:  # without a network each takes its time
                log.warning("%s: its data cannot be loaded (%s): looking at the others too", found.task, found.reason)
            missing.append(found)
    if missing:
        raise EvaluationError(_message(missing, len(parts)))


def _missing(task: Any) -> MissingData | None:
    metadata = task.metadata
    path, revision = str(metadata.dataset.get("path")), str(metadata.dataset.get("revision"))
    try:
        copy.deepcopy(task).load_data()
        cached = set(_cached_revisions(path))
        # Some tasks of mteb name their revision by its first digits.
        if not cached or any(commit.startswith(revision) for commit in cached):
            return None
        reason = f"the cache has revision {', '.join(sorted(cached))} of it instead"
    except PipelineError as error:
        reason = str(error)
    # The libraries raise whatever the network, the cache or the files give them; all of it is about this data.
    except Exception as error:
        reason = first_line(error)
    return MissingData(metadata.name, f"{path} at {revision}", reason)


def _cached_revisions(path: str) -> Iterator[str]:
    """Commits of a hub data set in the cache of data sets."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    organisation, _, name = path.rpartition("/")
    folder = "___".join(filter(None, [organisation, camelcase_to_snakecase(name)]))
    for version in Path(datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*"):
        if version.is_dir() and len(version.name) == 40:
            yield version.name


def _message(missing: Sequence[MissingData], total: int) -> str:
    import datasets

    offline = "HF_HUB_OFFLINE is set, so only the cache was looked into. " if datasets.config.HF_HUB_OFFLINE else ""
    lines = [
        f"the data of {len(missing)} of {total} tasks cannot be loaded:",
        *(f"  {found.task}: {found.source}: {found.reason}" for found in missing),
        f"{offline}The cache is {datasets.config.HF_DATASETS_CACHE}. Where there is a network, this fills it "
        "(then bring the folder HF_HOME here):",
        f'  python -c "import mteb; [t.load_data() for t in mteb.get_tasks({[found.task for found in missing]})]"',
    ]
    return "\n".join(lines)
