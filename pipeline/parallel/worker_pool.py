"""Worker processes on one machine, each on its own device.

A worker starts by `spawn` in the environment of its device, set before any heavy import. It talks to its owner over one
pipe and shares no lock, so its death cannot block another. It ends when its owner is gone, even by `kill -9`.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import psutil

from pipeline.core.errors import PipelineError
from pipeline.core.run import collect_garbage_rarely, device_memory_error, is_out_of_memory, quiet_libraries
from pipeline.parallel.devices import Device

log = logging.getLogger(__name__)

# Seconds that a worker has to stop by itself.
GRACE_SECONDS = 15.0
# Messages taken from one worker before those of the next.
BURST = 64


class Stopped(Exception):
    """Raised in a worker when its owner stops it."""


class Channel:
    """A worker's end of the pipe to its owner."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # The pipe is always read: an owner that waits to write would wait for ever for a worker that also writes.
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Any:
        """The owner's next message. Raises Stopped once the owner stops the worker."""
        return self._checked(self._arrived.get())

    def arrived(self) -> Iterator[Any]:
        """The owner's messages that have arrived. Raises Stopped as `receive` does."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._checked(self._arrived.get_nowait())

    def send(self, message: Any) -> None:
        """Send a message to the owner. Raises Stopped as `receive` does."""
        if self._stopping.is_set():
            raise Stopped
        try:
            self._connection.send((message, None))
        except OSError:
            raise Stopped from None

    def fail(self, error: PipelineError) -> None:
        """Send the owner the error that ends the worker."""
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
            # The owner was killed: nobody needs the work in progress.
            os._exit(1)
        self._stopping.set()
        self._arrived.put(None)
        # It closes the pipe now. Killed while it waits for this worker's last job, it needs that job no more.
        owner = multiprocessing.parent_process()
        if owner is not None:
            owner.join()
            os._exit(1)


Serve = Callable[[Channel], None]


@dataclass
class _Worker:
    name: str
    process: SpawnProcess
    connection: "Connection[Any, Any]"


class WorkerPool:
    """Processes that each run `serve(channel)`, one on each device, until `close`."""

    def __init__(self, serve: Serve, devices: Sequence[Device], *, kind: str, error: type[PipelineError]) -> None:
        """Start them.

        Args:
            serve: the work of one (picklable); it returns, or lets Stopped pass, when it is stopped.
            kind: what they are, for messages ("engine process").
            error: raised when one of them dies.
        """
        self._kind, self._error = kind, error
        self._workers: list[_Worker] = []
        self._death: PipelineError | None = None
        # Otherwise the interpreter's exit would wait for workers that wait for messages.
        atexit.register(self.close)
        try:
            for index, device in enumerate(devices):
                self._workers.append(self._start(index, device, serve))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._workers)

    def wait_until_ready(self) -> list[Any]:
        """The first message of each worker, in their order. If one fails, all are stopped; raises as `receive`."""
        started = time.monotonic()
        ready: dict[int, Any] = {}
        try:
            while len(ready) < len(self):
                ready |= self.receive()
        except BaseException:
            self.close()
            raise
        names = ", ".join(worker.name for worker in self._workers)
        log.info("%s: ready after %.1f s", names, time.monotonic() - started)
        return [ready[index] for index in range(len(self))]

    def send(self, index: int, message: Any) -> None:
        """Send a message (not None) to one worker. If the worker is dead, `receive` raises."""
        with contextlib.suppress(OSError):
            self._workers[index].connection.send(message)

    def receive(self) -> list[tuple[int, Any]]:
        """Messages of the workers, at least one, as (worker, message).

        Raises:
            PipelineError: a worker failed with this error or died (`error`), and all messages have been received.
        """
        while True:
            # After a death, messages that have already been sent are still received.
            found = self._collect(timeout=None if self._death is None else 0)
            if found:
                return found
            if self._death is not None:
                raise self._death

    def _collect(self, timeout: float | None) -> list[tuple[int, Any]]:
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
        """Stop all workers; kill those that do not stop by themselves."""
        atexit.unregister(self.close)
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            # A worker that sends now finds the pipe closed instead of full.
            worker.connection.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                log.warning("%s does not stop: killing it", worker.name)
                _kill(worker.process)

    def _start(self, index: int, device: Device, serve: Serve) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(index, device.cores, theirs, serve), name=f"worker-{index}")
        # Starting the helper process of multiprocessing would unblock the signal.
        resource_tracker.ensure_running()
        with _environment(device.environment), signals_blocked({signal.SIGINT}):
            process.start()
        theirs.close()
        return _Worker(f"{self._kind} {index} ({device.name})", process, ours)

    def _drain(self, worker: _Worker) -> Iterator[Any]:
        """The messages of a worker that has some; records its failure or death."""
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
        how = describe_exit(worker.process.exitcode or 0)
        return self._error(f"{worker.name} died ({how}); finished rows are kept")


def describe_exit(code: int) -> str:
    """The end of a process in words; `code` is negative for a signal, as in `subprocess`."""
    if code >= 0:
        return f"exit code {code}"
    how = f"killed by {signal.Signals(-code).name}"
    return f"{how}; the system does that when memory runs out" if code == -signal.SIGKILL else how


@contextlib.contextmanager
def signals_blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Processes started in the block inherit blocked signals; this process gets its own after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(index: int, cores: Sequence[int], connection: "Connection[Any, Any]", serve: Serve) -> None:
    # The owner stops its workers, also when SIGTERM goes to the whole process group.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    collect_garbage_rarely()
    _log_as(index)
    channel = Channel(connection)
    try:
        serve(channel)
    except Stopped:
        return
    except PipelineError as error:
        channel.fail(error)
    except Exception as error:
        if is_out_of_memory(error):
            channel.fail(device_memory_error(error))
            return
        log.exception("unexpected error")
        channel.fail(PipelineError(f"{type(error).__name__}: {error} (its traceback is above)"))


def _log_as(index: int) -> None:
    """All workers log the same at the start: only the first logs below warnings."""
    quiet_libraries()
    logging.basicConfig(
        format=f"%(levelname)s worker {index}: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True
    )
    logging.getLogger("pipeline").setLevel(logging.WARNING if index else logging.INFO)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """`os.environ` with changes, for processes started in the block."""
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


def _kill(process: SpawnProcess) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.join()
