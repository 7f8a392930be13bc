"""Calls on many texts, divided among worker processes that each hold the same model.

A call of a method on many texts becomes jobs of similar lengths, the longest first; a free worker takes the next job.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipeline.core.errors import PipelineError
from pipeline.core.text import by_length
from pipeline.parallel.devices import Device
from pipeline.parallel.worker_pool import Channel, WorkerPool


class Job(NamedTuple):
    """To a worker: which method of its object to call with which texts and keyword arguments."""

    number: int
    method: str
    texts: list[str]
    arguments: Mapping[str, Any]


class Result(NamedTuple):
    """From a worker: what the job's method returned."""

    number: int
    value: Any


class TextPool:
    """The same object in each of several processes; its methods take texts and return something for each.

    Attributes:
        facts: what `describe` returned, the same for all.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        describe: Callable[[Any], Any],
        devices: Sequence[Device],
        *,
        job_texts: int,
        job_characters: int | None = None,
        kind: str,
        error: type[PipelineError],
    ) -> None:
        """Start the processes and wait until all objects are loaded.

        Args:
            load: loads the object (picklable); runs in each process.
            describe: computes `facts` from it (picklable).
            job_texts: most texts of a job.
            job_characters: most characters of a job; None: no limit.
            kind: as of `WorkerPool`.

        Raises:
            PipelineError: what was raised when an object was loaded, or `error` if its process died.
        """
        self._job_texts, self._job_characters, self._number = job_texts, job_characters, 0
        self._workers = WorkerPool(partial(serve, load, describe), devices, kind=kind, error=error)
        self.facts = self._workers.wait_until_ready()[0]

    def __len__(self) -> int:
        return len(self._workers)

    def run(self, method: str, texts: Sequence[str], **arguments: Any) -> Iterator[tuple[list[int], Any]]:
        """The rows and the result of each job, in the order of completion; a worker has one job waiting."""
        split = split_texts(texts, self._job_texts, len(self._workers), self._job_characters)
        jobs = {self._number + offset: rows for offset, rows in enumerate(split)}
        self._number += len(jobs)
        waiting, open_jobs = iter(jobs.items()), set(jobs)

        def give(worker: int) -> None:
            if job := next(waiting, None):
                self._workers.send(worker, Job(job[0], method, [texts[row] for row in job[1]], arguments))

        for worker in [*range(len(self._workers))] * 2:
            give(worker)
        while open_jobs:
            for worker, result in self._workers.receive():
                # A job of an earlier run that was broken off may still answer.
                if result.number in open_jobs:
                    open_jobs.remove(result.number)
                    give(worker)
                    yield jobs[result.number], result.value

    def close(self) -> None:
        """Stop the processes."""
        self._workers.close()


def split_texts(
    texts: Sequence[str], job_texts: int, workers: int, job_characters: int | None = None
) -> list[list[int]]:
    """Rows of `texts` by falling length, in groups within the limits of a job and at least one for each worker."""
    most = max(1, min(job_texts, -(-len(texts) // workers)))
    return by_length(texts, most, job_characters or sum(map(len, texts)))


def serve(load: Callable[[], Any], describe: Callable[[Any], Any], channel: Channel) -> None:
    """A worker's work: load the object, then do job after job."""
    served = load()
    channel.send(describe(served))
    while True:
        job: Job = channel.receive()
        channel.send(Result(job.number, getattr(served, job.method)(job.texts, **job.arguments)))
