"""Several teachers, one process and one GPU each, behind the interface of one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError, nested_in
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.base import Teacher
from pipeline.embed.teachers.load import load_teacher
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.optim.batching import CHARACTERS_PER_TOKEN, token_budget
from pipeline.parallel.devices import Count, Device, split_devices, worker_count
from pipeline.parallel.text_pool import TextPool

# Enough to fill a worker's batches with texts of like lengths, little enough that the workers end together.
JOB_BATCHES = 2
JOB_TEXTS = 1024


class ParallelTeacher:
    """A `Teacher` on each device; `TextPool` divides the texts of a call among them."""

    def __init__(self, load: Callable[[], Teacher], devices: Sequence[Device], batch_tokens: int | None = None) -> None:
        """Start a process for each device, which calls `load` (picklable), and wait until all teachers are loaded.

        A job is about `JOB_BATCHES` forward passes of `batch_tokens` (None: by the device).

        Raises what `load` raised, or TeacherError if a process died.
        """
        describe = attrgetter("width", "max_tokens", "identity")
        self._pool = TextPool(
            load,
            describe,
            devices,
            job_texts=JOB_TEXTS,
            job_characters=JOB_BATCHES * CHARACTERS_PER_TOKEN * token_budget(batch_tokens, best_device()),
            kind="teacher process",
            error=TeacherError,
        )
        self.width, self.max_tokens, self.identity = self._pool.facts

    @property
    def processes(self) -> int:
        """Number of processes: a call needs as many batches to keep all of them busy."""
        return len(self._pool)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.width), np.float32)
        for rows, value in self._pool.run("embed", texts):
            vectors[rows] = value
        return vectors

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        lengths: dict[int, Any] = {}
        for rows, values in self._pool.run("token_lengths", texts):
            lengths |= zip(rows, values, strict=True)
        return [lengths[row] for row in range(len(texts))]

    def close(self) -> None:
        """Stop the processes."""
        self._pool.close()


def open_teacher(
    params: TeacherParams, backbone: BackboneParams, data_parallel: Count
) -> AbstractContextManager[Teacher]:
    """Load the teacher of the params: in this process, or in several that stop when the context ends.

    `data_parallel` counts the processes; "auto" is one a visible GPU, and one on a CPU.

    Raises:
        TeacherError: it cannot be loaded with these params, or there are too few GPUs.
        BackboneError: the language model that it is built on cannot be loaded.
    """
    count = 1
    if data_parallel != "auto" or TEACHERS[params.kind].parallel:
        with nested_in(names={"processes": "data_parallel"}):
            count = worker_count(data_parallel, gpus_each=1, error=TeacherError)
    load = partial(load_teacher, params, backbone)
    if count == 1:
        return nullcontext(load())
    return closing(ParallelTeacher(load, split_devices(count), params.batch_tokens))
