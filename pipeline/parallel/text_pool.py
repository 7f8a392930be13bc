"""Calls on many texts, divided among workers that each hold the same model: processes here, or actors of a Ray cluster.

A call of a method on many texts becomes jobs of similar lengths, the longest first; a free worker takes the next job.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipeline.core.errors import PipelineError
from pipeline.core.text import by_length
from pipeline.parallel.devices import RAY, Places
from pipeline.parallel.ray_pool import Call, RayWorkers
from pipeline.parallel.worker_pool import Channel, WorkerPool


class Job(NamedTuple):
    """To a worker: which method of its object to call with which texts and keyword arguments."""

    number: int
    call: Call


class Result(NamedTuple):
    """From a worker: what the job's method returned."""

    number: int
    value: Any


class TextPool:
    """The same object in each of several workers; its methods take texts and return something for each.

    Attributes:
        facts: what `describe` returned, the same for all.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        describe: Callable[[Any], Any],
        places: Places,
        *,
        job_texts: int,
        job_characters: int | None = None,
        kind: str,
        error: type[PipelineError],
    ) -> None:
        """Start the workers and wait until all objects are loaded, or one on a Ray cluster.

        Args:
            load: loads the object (picklable); runs in each worker.
            describe: computes `facts` from it (picklable).
            places: a process on each of these devices, or `RAY`.
            job_texts: most texts of a job.
            job_characters: most characters of a job; None: no limit.
            kind: as of `WorkerPool`.

        Raises:
            PipelineError: what was raised when an object was loaded, or `error` if its worker died.
        """
        self._job_texts, self._job_characters, self._number = job_texts, job_characters, 0
        self._workers: RayWorkers | _Processes = (
            RayWorkers(load, describe, kind=kind, error=error)
            if places == RAY
            else _Processes(WorkerPool(partial(serve, load, describe), places, kind=kind, error=error))
        )
        self.facts = self._workers.facts

    def __len__(self) -> int:
        return len(self._workers)

    def run(self, method: str, texts: Sequence[str], **arguments: Any) -> Iterator[tuple[list[int], Any]]:
        """The rows and the result of each job, in the order of completion; a worker has one job waiting."""
        split = split_texts(texts, self._job_texts, len(self), self._job_characters)
        rows = {self._number + offset: chosen for offset, chosen in enumerate(split)}
        self._number += len(rows)
        jobs = {number: (method, [texts[row] for row in chosen], arguments) for number, chosen in rows.items()}
        yield from ((rows[number], value) for number, value in self._workers.run(jobs))

    def close(self) -> None:
        """Stop the workers."""
        self._workers.close()


class _Processes:
    """Workers on this machine."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.facts = pool.wait_until_ready()[0]

    def __len__(self) -> int:
        return len(self._pool)

    def run(self, jobs: Mapping[int, Call]) -> Iterator[Result]:
        waiting, open_jobs = iter(jobs.items()), set(jobs)

        def give(worker: int) -> None:
            if job := next(waiting, None):
                self._pool.send(worker, Job(*job))

        for worker in [*range(len(self._pool))] * 2:
            give(worker)
        while open_jobs:
            for worker, result in self._pool.receive():
                # A job of an earlier run that was broken off may still answer.
                if result.number in open_jobs:
                    open_jobs.remove(result.number)
                    give(worker)
                    yield result

    def close(self) -> None:
        self._pool.close()


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
        method, texts, arguments = job.call
        channel.send(Result(job.number, getattr(served, method)(texts, **arguments)))
