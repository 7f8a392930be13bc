"""Several engines, one process and one group of GPUs each, behind the interface of one.

Each engine asks for the next few prompts when it has room: faster engines get more rows, and only prompts in work are
in memory.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, Engine, Prompt, Sampling
from pipeline.parallel.devices import Device
from pipeline.parallel.worker_pool import Channel, WorkerPool

log = logging.getLogger(__name__)

# Prompts that an engine gets at once. It asks for the next ones while it still has this many.
CHUNK = 8


class Start(NamedTuple):
    """To a worker: begin a round of completions."""

    round: int
    sampling: Sampling


class Chunk(NamedTuple):
    """To a worker: prompts, and whether they are the last of the round."""

    round: int
    prompts: list[Prompt]
    last: bool


class Abort(NamedTuple):
    """To a worker: stop this round."""

    round: int


class EngineReady(NamedTuple):
    """From a worker: its engine is loaded."""


class Want(NamedTuple):
    """From a worker: it needs the next prompts."""

    round: int


class Answer(NamedTuple):
    """From a worker: a completion."""

    round: int
    completion: Completion


class Done(NamedTuple):
    """From a worker: all its prompts of the round are answered."""

    round: int


class ParallelEngine:
    """Several engine processes, fed from one stream of prompts."""

    def __init__(self, load: Callable[[], Engine], devices: Sequence[Device]) -> None:
        """Start a process for each device and wait until all engines are loaded; `load` (picklable) runs in each.

        Raises an engine's own PipelineError, or EngineError if its process died.
        """
        self._workers = WorkerPool(partial(serve, load), devices, kind="engine process", error=EngineError)
        self._round = 0
        self._workers.wait_until_ready()

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; if a process dies, all finished rows are yielded first."""
        self._round += 1
        source = iter(prompts)
        running = set(range(len(self._workers)))
        for index in running:
            self._workers.send(index, Start(self._round, sampling))
        try:
            while running:
                for index, message in self._received():
                    match message:
                        case Want():
                            self._workers.send(index, self._chunk(source))
                        case Answer(completion=completion):
                            yield completion
                        case Done():
                            running.discard(index)
        finally:
            for index in running:
                self._workers.send(index, Abort(self._round))

    def close(self) -> None:
        self._workers.close()

    def _received(self) -> list[tuple[int, Any]]:
        """Messages of this round; an aborted round may still send."""
        return [(index, message) for index, message in self._workers.receive() if message.round == self._round]

    def _chunk(self, source: Iterator[Prompt]) -> Chunk:
        prompts = list(islice(source, CHUNK))
        return Chunk(self._round, prompts, last=len(prompts) < CHUNK)


def serve(load: Callable[[], Engine], channel: Channel) -> None:
    """A worker's work: load an engine, then complete round after round."""
    with closing(load()) as engine:
        channel.send(EngineReady())
        while True:
            message = channel.receive()
            if isinstance(message, Start):
                _Round(channel, message).run(engine)


class _Aborted(Exception):
    """The owner stopped the round."""


class _Round:
    """One round of a worker: an iterator over its prompts as they arrive."""

    def __init__(self, channel: Channel, start: Start) -> None:
        self._channel, self._number, self._sampling = channel, start.round, start.sampling
        self._prompts: deque[Prompt] = deque()
        self._asked = self._last = False

    def run(self, engine: Engine) -> None:
        """Complete the round's prompts, unless the owner aborts it."""
        completions = engine.generate(self, self._sampling)
        try:
            for completion in completions:
                self._channel.send(Answer(self._number, completion))
                for message in self._channel.arrived():
                    self._take(message)
        except _Aborted:
            return
        finally:
            if isinstance(completions, Generator):
                completions.close()
        self._channel.send(Done(self._number))

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        if len(self._prompts) <= CHUNK and not self._asked and not self._last:
            self._channel.send(Want(self._number))
            self._asked = True
        while not self._prompts:
            if self._last:
                raise StopIteration
            self._take(self._channel.receive())
        return self._prompts.popleft()

    def _take(self, message: Any) -> None:
        match message:
            case Chunk(round=number) if number == self._number:
                self._prompts.extend(message.prompts)
                self._asked, self._last = False, message.last
            case Abort(round=number) if number == self._number:
                raise _Aborted
