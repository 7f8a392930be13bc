"""A small engine, alone and as the engines of a Ray data set; run as a program, stage generate with it on a cluster.

python -m tests.generate.engines.ray_stage       in place of `python -m pipeline.generate`
"""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.generate.engines.base import Completion, Prompt, Query, Sampling

# A text with this in it fails.
BAD = "out of luck"
# A busy machine may take this long to start a few workers of Ray.
SECONDS = 240


class SumEngine:
    """Answers with the sum of the prompt's tokens; a row takes `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        for prompt in prompts:
            time.sleep(self._delay)
            if BAD in prompt.text:
                yield Completion.failed(prompt.id, BAD)
            else:
                yield Completion(prompt.id, f"sum {sum(prompt.token_ids)} of {prompt.seed}", "stop", 2)

    def close(self) -> None:
        """Nothing to free."""


def together(marks: Path, actors: int) -> None:
    """Wait until so many actors have left a mark."""
    deadline = time.monotonic() + SECONDS
    while len(list(marks.iterdir())) < actors and time.monotonic() < deadline:
        time.sleep(0.05)


class Answering:
    """An actor that answers the rows of a block with a `SumEngine`, once `together` of them are up.

    It leaves a file in `marks`, named by its process and its node: when it was up, then each row with when it was done.
    """

    def __init__(self, marks: Path, delay: float, together: int) -> None:
        import ray

        self._engine, self._marks, self._together = SumEngine(delay), marks, together
        self._mark = marks / f"{os.getpid()}-{ray.get_runtime_context().get_node_id()}"
        self._mark.write_text(f"up {time.time()}\n")

    def __call__(self, rows: pa.Table) -> pa.Table:
        together(self._marks, self._together)
        # Twice, as Ray delivers a block whose machine was lost.
        return pa.Table.from_pylist([self._answered(row) for row in rows.to_pylist()] * 2)

    def _answered(self, row: dict[str, Any]) -> dict[str, Any]:
        query: Query = pickle.loads(row["query"])
        error, found = row["__inference_error__"], None
        if not error:
            found = next(self._engine.generate([query.prompt], Sampling(4)))
            error = found.error or ""
            with self._mark.open("a") as file:
                file.write(f"{row['number']} {time.time()}\n")
        answer = {"text": found.text, "tokens": found.response_tokens} if found else {"text": "", "tokens": 0}
        return {"number": row["number"], "query": row["query"], "__inference_error__": error, "last": 2, **answer}


def process(
    marks: Path, replicas: tuple[int, int], delay: float, together: int = 1, cpus: int = 1
) -> Callable[[Sampling], Callable[[Any], Any]]:
    """As `RayEngine.process`: between so many actors of so many logical CPUs each."""
    arguments = {"fn_constructor_args": (marks, delay, together), "concurrency": replicas, "num_cpus": cpus}
    return lambda _: lambda rows: rows.map_batches(Answering, batch_size=None, batch_format="pyarrow", **arguments)


if __name__ == "__main__":
    from pipeline.generate import __main__ as stage
    from pipeline.generate.engines import ray as engine

    found = process(Path("marks").resolve(), (2, 2), delay=0.05)
    engine.vllm_processor = lambda *arguments: found(arguments[-1])
    stage.app()
