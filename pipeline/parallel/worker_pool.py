"""Processes that share one machine's work, each in its own place.

A worker is started by `spawn` with the environment of its place, so that nothing heavy is imported before it is set.
It talks to its owner over one pipe and to nobody else: no lock is shared, so that one worker's death cannot block
another. A worker whose owner is gone, even by `kill -9`, ends at once; Ctrl-C is the owner's to hear.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import psutil

from pipeline.core.errors import PipelineError
from pipeline.parallel.devices import Place

log = logging.getLogger(__name__)

# Seconds that a worker gets to stop by itself.
GRACE_SECONDS = 15.0
# Messages taken from one worker before the others have their turn.
BURST = 64


class Stopped(Exception):
    """Raised in a worker whose owner wants it to stop."""


class Channel:
    """A worker's end of the pipe to its owner."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # The pipe is always read, so that the owner never waits for a worker that waits for the owner.
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Any:
        """The owner's next message. Raises Stopped once the owner wants the worker to stop."""
        return self._checked(self._arrived.get())

    def arrived(self) -> Iterator[Any]:
        """The owner's messages that are there already. Raises Stopped as `receive` does."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._checked(self._arrived.get_nowait())

    def send(self, message: Any) -> None:
        """Hand a message to the owner. Raises Stopped as `receive` does."""
        if self._stopping.is_set():
            raise Stopped
        try:
            self._connection.send((message, None))
        except OSError:
            raise Stopped from None

    def fail(self, error: PipelineError) -> None:
        """Tell the owner why the worker ends."""
        with contextlib.suppress(OSError):
            self._connection.send((None, error))

    def _checked(self, message: Any) -> Any:
        if message is None:
            self._arrived.put(None)
            raise Stopped
        return message

    def _read(self) -> None:
        try:
            while (message := self._connection.recv()) is not None:
                self._arrived.put(message)
        except (EOFError, OSError):
            # No word of farewell: the owner was killed, and nobody needs what is under way here.
            os._exit(1)
        self._stopping.set()
        self._arrived.put(None)


Serve = Callable[[Channel], None]


@dataclass
class _Worker:
    name: str
    process: SpawnProcess
    connection: "Connection[Any, Any]"


class Workers:
    """Processes that each run `serve(channel)`, one in each place, until `close`."""

    def __init__(self, serve: Serve, where: Sequence[Place], *, kind: str, error: type[PipelineError]) -> None:
        """Start them.

        Args:
            serve: what a worker does (picklable); it returns, or lets Stopped pass, when it is told to stop.
            where: a place for each.
            kind: what they are, for messages ("engine process").
            error: raised when one of them dies.
        """
        self._kind, self._error = kind, error
        self._workers: list[_Worker] = []
        self._death: PipelineError | None = None
        # Without this, leaving the interpreter would wait for workers that wait for messages.
        atexit.register(self.close)
        try:
            for index, place in enumerate(where):
                self._workers.append(self._start(index, place, serve))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._workers)

    def send(self, index: int, message: Any) -> None:
        """Hand a message (not None) to one worker. That it is dead shows in `receive`."""
        with contextlib.suppress(OSError):
            self._workers[index].connection.send(message)

    def receive(self) -> list[tuple[int, Any]]:
        """What workers have sent, at least one message, as (worker, message).

        Raises:
            PipelineError: a worker failed with this error, or died (`error`), and all that was sent has been received.
        """
        while True:
            # After a death nobody waits any more, but what the others have sent is not lost.
            found = self._collect(timeout=None if self._death is None else 0)
            if found:
                return found
            if self._death is not None:
                raise self._death

    def _collect(self, timeout: float | None) -> list[tuple[int, Any]]:
        """What is there, after waiting for it; notes a death."""
        ends = [end for worker in self._workers for end in (worker.connection, worker.process.sentinel)]
        ready = wait(ends, timeout)
        found: list[tuple[int, Any]] = []
        for index, worker in enumerate(self._workers):
            if worker.connection in ready:
                found += ((index, message) for message in self._drain(worker))
            elif worker.process.sentinel in ready:
                self._death = self._death or self._dead(worker)
        return found

    def close(self) -> None:
        """Stop all workers, those that do not stop by themselves by force."""
        atexit.unregister(self.close)
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            # A worker that is about to send finds the pipe closed instead of full.
            worker.connection.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                log.warning("%s does not stop: killing it", worker.name)
                _kill(worker.process)

    def _start(self, index: int, place: Place, serve: Serve) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(index, place.cores, theirs, serve), name=f"worker-{index}")
        with _environment(place.environment), _no_interrupts():
            process.start()
        theirs.close()
        return _Worker(f"{self._kind} {index} ({place.name})", process, ours)

    def _drain(self, worker: _Worker) -> Iterator[Any]:
        """The messages of a worker that has some; notes its failure or its death."""
        for _ in range(BURST):
            try:
                message, error = worker.connection.recv()
            except (EOFError, OSError):
                self._death = self._death or self._dead(worker)
                return
            if error is not None:
                self._death = type(error)(f"{worker.name}: {error.message}", argument=error.argument)
                self._death.section = error.section
                return
            yield message
            if not worker.connection.poll():
                return

    def _dead(self, worker: _Worker) -> PipelineError:
        worker.process.join(GRACE_SECONDS)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}, {how}"
            if code == -signal.SIGKILL:
                how += "; the system does that when memory runs out"
        return self._error(f"{worker.name} died ({how}); finished rows are kept")


def _run(index: int, cores: Sequence[int], connection: "Connection[Any, Any]", serve: Serve) -> None:
    """A worker's life."""
    # The owner says when to stop, also when a whole process group is told to end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    _log_as(index)
    channel = Channel(connection)
    try:
        serve(channel)
    except Stopped:
        return
    except PipelineError as error:
        channel.fail(error)
    except Exception as error:
        log.exception("unexpected error")
        channel.fail(PipelineError(f"{type(error).__name__}: {error} (its traceback is above)"))


def _log_as(index: int) -> None:
    """Every worker says the same at the start: the first speaks for all, the others only warn."""
    logging.basicConfig(
        format=f"%(levelname)s worker {index}: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True
    )
    logging.getLogger("pipeline").setLevel(logging.WARNING if index else logging.INFO)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """`os.environ` with changes, for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that start meanwhile never hear Ctrl-C; this one hears it right after."""
    # Starting the helper process of multiprocessing would lift the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: SpawnProcess) -> None:
    """End a worker and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.join()
