"""Several teachers, one process and one GPU each, behind the interface of one."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone import BackboneParams
from pipeline.errors import TeacherError
from pipeline.places import Count, Place, places, worker_count
from pipeline.teachers import TeacherParams, build_teacher
from pipeline.teachers.base import Teacher
from pipeline.workers import Channel, Workers

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """From a worker: its teacher is loaded."""

    width: int
    identity: dict[str, Any]


class Job(NamedTuple):
    """To a worker: which method of the teacher to call with which texts."""

    number: int
    method: str
    texts: list[str]


class Result(NamedTuple):
    """From a worker: what the job's method gave."""

    number: int
    value: Any


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
        started = time.monotonic()
        self._job_texts, self._number = job_texts, 0
        self._workers = Workers(partial(serve, load), where, kind="teacher process", error=TeacherError)
        try:
            self.width, self.identity = self._await_ready()
        except BaseException:
            self.close()
            raise
        names = ", ".join(place.name for place in where)
        log.info("%d teacher processes (%s), ready after %.1f s", len(where), names, time.monotonic() - started)

    @property
    def processes(self) -> int:
        """How many share the texts of one call: give it as many more at once."""
        return len(self._workers)

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        import numpy as np

        vectors = np.empty((len(texts), self.width), np.float32)
        for chosen, value in self._run("embed", texts):
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
        self._workers.close()

    def _await_ready(self) -> tuple[int, dict[str, Any]]:
        ready: dict[int, Ready] = {}
        while len(ready) < len(self._workers):
            ready |= self._workers.receive()
        return ready[0].width, ready[0].identity

    def _each(self, method: str, texts: Sequence[str]) -> list[Any]:
        """What `method` gives for each text."""
        found: dict[int, Any] = {}
        for chosen, value in self._run(method, texts):
            found |= zip(chosen, value, strict=True)
        return [found[row] for row in range(len(texts))]

    def _run(self, method: str, texts: Sequence[str]) -> Iterator[tuple[list[int], Any]]:
        """The jobs' rows and results, as they come; each worker has one job in hand and one waiting."""
        jobs = {self._number + offset: rows for offset, rows in enumerate(self._split(texts))}
        self._number += len(jobs)
        waiting, open_jobs = iter(jobs.items()), set(jobs)

        def give(worker: int) -> None:
            if job := next(waiting, None):
                self._workers.send(worker, Job(job[0], method, [texts[row] for row in job[1]]))

        for worker in [*range(len(self._workers))] * 2:
            give(worker)
        while open_jobs:
            for worker, result in self._workers.receive():
                # A run that was broken off may still answer.
                if result.number in open_jobs:
                    open_jobs.remove(result.number)
                    give(worker)
                    yield jobs[result.number], result.value

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """Rows of `texts` by falling length, in groups of at most `job_texts` and at least one for each worker."""
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        size = max(1, min(self._job_texts, -(-len(order) // len(self._workers))))
        return [order[start : start + size] for start in range(0, len(order), size)]


def serve(load: Callable[[], Teacher], channel: Channel) -> None:
    """A worker's work: load a teacher, then do job after job."""
    teacher = load()
    channel.send(Ready(teacher.width, teacher.identity))
    while True:
        job: Job = channel.receive()
        channel.send(Result(job.number, getattr(teacher, job.method)(job.texts)))


@contextmanager
def open_teacher(params: TeacherParams, backbone: BackboneParams, data_parallel: Count) -> Iterator[Teacher]:
    """The teacher of the params: in this process, or in several that are stopped at the end.

    Args:
        params: which teacher.
        backbone: the language model, for the teachers that are built on it.
        data_parallel: processes; "auto" is one a visible GPU, and one on a CPU.

    Raises:
        TeacherError: it cannot be loaded with these params, or there are too few GPUs.
        BackboneError: the backbone cannot be loaded.
    """
    count = _processes(params, data_parallel)
    load = partial(build_teacher, params, backbone)
    if count == 1:
        yield load()
        return
    with closing(ParallelTeacher(load, places(count), params.batch_size)) as teacher:
        yield teacher


def _processes(params: TeacherParams, data_parallel: Count) -> int:
    if params.kind == "hash" and data_parallel == "auto":
        return 1
    return worker_count(data_parallel, gpus_each=1, knob="embed.data_parallel", error=TeacherError)
