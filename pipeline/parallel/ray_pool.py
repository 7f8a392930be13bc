"""The workers of a `TextPool` as actors of a Ray cluster: one a GPU, or one a machine where there is none.

An actor that is lost with its machine gives its jobs back, and another starts where there is room. Machines that join
are used from the next call on.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, describe
from pipeline.parallel.ray_cluster import connected, worker_environment

# So many actors lost with the same job, or one after another while they load, are no accident.
MOST_LOST = 3
# Jobs that an actor has at once: one waits.
JOBS_EACH = 2
WAIT_SECONDS = 3600.0
LOST = object()

Call = tuple[str, list[str], Mapping[str, Any]]


class Holder:
    """The actor: it loads an object and calls its methods."""

    def load(self, folder: Path, load: Callable[[], Any], facts: Callable[[Any], Any]) -> Any:
        """Load the object; `folder` is the owner's, to which paths are relative."""
        os.chdir(folder)
        self._held = load()
        return facts(self._held)

    def call(self, method: str, texts: list[str], arguments: Mapping[str, Any]) -> Any:
        """Call a method of the object."""
        return getattr(self._held, method)(texts, **arguments)


class RayWorkers:
    """Actors that each hold the same object.

    Attributes:
        facts: what `describe` said of the object that was loaded first.
    """

    def __init__(
        self, load: Callable[[], Any], describe: Callable[[Any], Any], *, kind: str, error: type[PipelineError]
    ) -> None:
        """Connect to Ray, start the actors, and wait until one has loaded its object; arguments as of `TextPool`.

        Raises:
            PipelineError: what `load` raised, or `error` if Ray cannot be reached or actors are lost again and again.
        """
        self._loading, self._kind, self._error = (Path.cwd(), load, describe), kind, error
        self._actors: set[Any] = set()
        self._free: deque[Any] = deque()
        self._running: dict[Any, tuple[Any, int | None]] = {}  # by call: the actor, and its job; None: it loads
        self._lost: Counter[int | None] = Counter()
        with ExitStack() as stack:
            stack.enter_context(connected(error=error, argument="processes"))
            stack.callback(self._stop)
            self._fill()
            while (found := self._finished()[1]) is LOST:
                pass
            self.facts = found
            self._connection = stack.pop_all()

    def __len__(self) -> int:
        return len(self._actors)

    def run(self, jobs: Mapping[int, Call]) -> Iterator[tuple[int, Any]]:
        """The number and the result of each job, in the order of completion."""
        self._fill()
        waiting, missing = deque(jobs), set(jobs)
        while missing:
            while waiting and self._free:
                actor, number = self._free.popleft(), waiting.popleft()
                self._running[actor.call.remote(*jobs[number])] = actor, number
            done, value = self._finished()
            # A job of an earlier run that was broken off may still answer.
            if done in missing and value is LOST:
                waiting.appendleft(done)
            elif done in missing:
                missing.remove(done)
                yield done, value

    def close(self) -> None:
        """Stop the actors and leave Ray."""
        self._connection.close()

    def _fill(self) -> None:
        """Start as many actors as the cluster has room for now."""
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        variables = worker_environment(None if gpus else min(filter(None, cpus), default=1))
        while len(self._actors) < max(1, gpus or sum(map(bool, cpus))):
            actor = (
                ray.remote(Holder)
                .options(
                    num_cpus=1,
                    num_gpus=int(gpus > 0),
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": variables},
                )
                .remote()
            )
            self._actors.add(actor)
            self._running[actor.load.remote(*self._loading)] = actor, None

    def _finished(self) -> tuple[int | None, Any]:
        """The next call that ends: its job (None: it loaded) and the result, which is `LOST` if its actor is."""
        import ray

        ready, _ = ray.wait(list(self._running), timeout=WAIT_SECONDS)
        if not ready:
            raise self._error(
                f"no {self._kind} answered for {WAIT_SECONDS:g} s; `ray status` shows what they wait for",
                argument="processes",
            )
        actor, job = self._running.pop(ready[0])
        try:
            value = ray.get(ready[0])
        except ray.exceptions.RayTaskError as failed:
            if isinstance(failed.cause, PipelineError):
                raise failed.cause from None
            raise self._error(f"a {self._kind} failed: {describe(failed.cause)}") from failed
        except ray.exceptions.RayError as lost:
            self._replace(actor, job, lost)
            return job, LOST
        del self._lost[job]
        self._free.extend([actor] * (JOBS_EACH if job is None else 1))
        return job, value

    def _replace(self, actor: Any, job: int | None, lost: Exception) -> None:
        self._lost[job] += 1
        if self._lost[job] >= MOST_LOST:
            message = f"{MOST_LOST} times a {self._kind} of the Ray cluster was lost, at last by {describe(lost)}"
            raise self._error(f"{message}; finished rows are kept") from lost
        self._actors.discard(actor)
        self._free = deque(other for other in self._free if other != actor)
        self._fill()

    def _stop(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
