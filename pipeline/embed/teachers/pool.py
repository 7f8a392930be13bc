"""Several teachers, one process and one GPU each, behind the interface of one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers import TeacherParams, build_teacher
from pipeline.embed.teachers.base import Teacher
from pipeline.parallel.devices import Count, Place, places, worker_count
from pipeline.parallel.text_pool import TextJobs

if TYPE_CHECKING:
    import numpy as np


class Ready(NamedTuple):
    """What a process says of its teacher."""

    width: int
    identity: dict[str, Any]


class ParallelTeacher:
    """A teacher in each place. Texts are cut into jobs of similar lengths, the longest first; who is free takes one."""

    def __init__(self, load: Callable[[], Teacher], where: Sequence[Place], job_texts: int) -> None:
        """Start the processes and wait until all teachers are loaded.

        Args:
            load: loads a teacher (picklable); runs in each process.
            where: a place for each.
            job_texts: texts of a job.

        Raises:
            PipelineError: what a teacher raised when it was loaded, or TeacherError if its process died.
        """
        self._jobs = TextJobs(load, _ready, where, job_texts=job_texts, kind="teacher process", error=TeacherError)
        self.width, self.identity = self._jobs.facts

    @property
    def processes(self) -> int:
        """How many share the texts of one call: give it as many more at once."""
        return len(self._jobs)

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        import numpy as np

        vectors = np.empty((len(texts), self.width), np.float32)
        for chosen, value in self._jobs.run("embed", texts):
            vectors[chosen] = value
        return vectors

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_counts`."""
        return self._each("token_counts", texts)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """See `Teacher.truncated`."""
        return self._each("truncated", texts)

    def close(self) -> None:
        """Stop the processes."""
        self._jobs.close()

    def _each(self, method: str, texts: Sequence[str]) -> list[Any]:
        """What `method` gives for each text."""
        found: dict[int, Any] = {}
        for chosen, value in self._jobs.run(method, texts):
            found |= zip(chosen, value, strict=True)
        return [found[row] for row in range(len(texts))]


def _ready(teacher: Teacher) -> Ready:
    return Ready(teacher.width, teacher.identity)


@contextmanager
def open_teacher(
    params: TeacherParams, backbone: BackboneParams, data_parallel: Count, *, knob: str = "embed.data_parallel"
) -> Iterator[Teacher]:
    """The teacher of the params: in this process, or in several that are stopped at the end.

    Args:
        params: which teacher.
        backbone: the language model, for the teachers that are built on it.
        data_parallel: processes; "auto" is one a visible GPU, and one on a CPU.
        knob: the params key of `data_parallel`, for messages.

    Raises:
        TeacherError: it cannot be loaded with these params, or there are too few GPUs.
        BackboneError: the backbone cannot be loaded.
    """
    count = _processes(params, data_parallel, knob)
    load = partial(build_teacher, params, backbone)
    if count == 1:
        yield load()
        return
    with closing(ParallelTeacher(load, places(count), params.batch_size)) as teacher:
        yield teacher


def _processes(params: TeacherParams, data_parallel: Count, knob: str) -> int:
    if params.kind == "hash" and data_parallel == "auto":
        return 1
    return worker_count(data_parallel, gpus_each=1, knob=knob, error=TeacherError)
