"""Several teachers, one process and one GPU each, behind the interface of one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError, nested_in
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.base import Teacher
from pipeline.embed.teachers.registry import TEACHERS, build_teacher
from pipeline.parallel.devices import Count, Device, split_devices, worker_count
from pipeline.parallel.text_pool import TextPool

if TYPE_CHECKING:
    import numpy as np


class ParallelTeacher:
    """A teacher on each device; the texts of a call are shared out as `TextPool` does."""

    def __init__(self, load: Callable[[], Teacher], devices: Sequence[Device], job_texts: int) -> None:
        """Start the processes and wait until all teachers are loaded.

        Args:
            load: loads a teacher (picklable); runs in each process.
            devices: one for each process.
            job_texts: texts of a job.

        Raises:
            PipelineError: what a teacher raised when it was loaded, or TeacherError if its process died.
        """
        describe = attrgetter("width", "identity")
        self._pool = TextPool(load, describe, devices, job_texts=job_texts, kind="teacher process", error=TeacherError)
        self.width, self.identity = self._pool.facts

    @property
    def processes(self) -> int:
        """Number of processes: a call needs as many batches to keep all of them busy."""
        return len(self._pool)

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        import numpy as np

        vectors = np.empty((len(texts), self.width), np.float32)
        for rows, value in self._pool.run("embed", texts):
            vectors[rows] = value
        return vectors

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_counts`."""
        return self._in_order("token_counts", texts)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """See `Teacher.truncated`."""
        return self._in_order("truncated", texts)

    def close(self) -> None:
        """Stop the processes."""
        self._pool.close()

    def _in_order(self, method: str, texts: Sequence[str]) -> list[Any]:
        results: dict[int, Any] = {}
        for rows, values in self._pool.run(method, texts):
            results |= zip(rows, values, strict=True)
        return [results[row] for row in range(len(texts))]


def open_teacher(
    params: TeacherParams, backbone: BackboneParams, data_parallel: Count
) -> AbstractContextManager[Teacher]:
    """Load the teacher of the params: in this process, or in several that stop when the context ends.

    Args:
        params: section `embed.teacher`.
        backbone: for the kinds that are built on it.
        data_parallel: processes; "auto" is one a visible GPU, and one on a CPU.

    Raises:
        TeacherError: it cannot be loaded with these params, or there are too few GPUs.
        BackboneError: the language model that it is built on cannot be loaded.
    """
    count = 1
    if data_parallel != "auto" or TEACHERS[params.kind].parallel:
        with nested_in(names={"processes": "data_parallel"}):
            count = worker_count(data_parallel, gpus_each=1, error=TeacherError)
    load = partial(build_teacher, params, backbone)
    return (
        nullcontext(load()) if count == 1 else closing(ParallelTeacher(load, split_devices(count), params.batch_size))
    )
