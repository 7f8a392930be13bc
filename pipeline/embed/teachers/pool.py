"""Several teachers, one process and one GPU each, behind the interface of one; also on a Ray cluster."""

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
from pipeline.parallel.devices import Places, Spread, places_for
from pipeline.parallel.text_pool import TextPool

# Enough to fill a worker's batches with texts of like lengths, little enough that the workers end together.
JOB_BATCHES = 2
JOB_TEXTS = 1024


class ParallelTeacher:
    """A `Teacher` in each place; `TextPool` divides the texts of a call among them."""

    def __init__(self, load: Callable[[], Teacher], places: Places, batch_tokens: int | None = None) -> None:
        """Start a process for each place, which calls `load` (picklable); see `TextPool`.

        A job is about `JOB_BATCHES` forward passes of `batch_tokens` (None: by the device).

        Raises what `load` raised, or TeacherError if a process died.
        """
        describe = attrgetter("width", "max_tokens", "identity")
        self._pool = TextPool(
            load,
            describe,
            places,
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
    params: TeacherParams, backbone: BackboneParams, data_parallel: Spread
) -> AbstractContextManager[Teacher]:
    """Load the teacher of the params: in this process, or in several that stop when the context ends.

    `data_parallel` counts the processes; "auto" is one a visible GPU, and one on a CPU; "ray" is a Ray cluster.

    Raises:
        TeacherError: it cannot be loaded with these params, there are too few GPUs, or Ray cannot be reached.
        BackboneError: the language model that it is built on cannot be loaded.
    """
    load = partial(load_teacher, params, backbone)
    if data_parallel == "auto" and not TEACHERS[params.kind].parallel:
        return nullcontext(load())
    with nested_in(names={"processes": "data_parallel"}):
        places = places_for(data_parallel, error=TeacherError)
        if places is None:
            return nullcontext(load())
        return closing(ParallelTeacher(load, places, params.batch_tokens))
