"""A plan for many queries on a cluster: GPU hours and bytes by backbone, computed; nodes that fail, simulated.

    .venv/bin/python bench/plan_scale.py [--rows 100000000] [--nodes 2] [--failures 2] [--shard 4096]

Hours are those of `python -m pipeline params --gpu NAME` (pipeline/cli/cost.py), here for rows of mean length. The
simulation deals `generate` in shards to nodes: a node that fails loses the shard that it works on and comes back after
a while; one writer commits what the nodes finish. No model is run. The last line is JSON.
"""

import argparse
import heapq
import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import print_table, show
from pipeline.backbone.sizes import ModelSizes
from pipeline.cli.cost import COMPUTE_SHARE, answer_seconds
from pipeline.cli.presets import presets
from pipeline.optim.flops import read_flops, step_flops
from pipeline.optim.gpus import GPUS, Gpu

HOUR, DAY, TB = 3600.0, 86400.0, 1e12
COMPRESSION_TOKENS = 10
# Measured with bench/memory.py, docs/scale.md: compressed Parquet of random English words, by tokens and by rows.
BYTES_PER_TOKEN, BYTES_PER_ROW = 3.2, 40.0


# --- nodes that fail ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Machines that take shards from one queue.

    Attributes:
        rows_per_second: of one node.
        shard_rows: rows that a node hands over together, and so loses together.
        restart_seconds: from a failure until the node takes a shard again.
        writer_rows_per_second: of the one process that commits finished rows.
    """

    nodes: int
    rows_per_second: float
    shard_rows: int
    restart_seconds: float
    writer_rows_per_second: float


@dataclass(frozen=True)
class Outcome:
    """Seconds until the last row is committed, failures of working nodes, rows that were computed and lost."""

    seconds: float
    failures: int
    recomputed_rows: int


@dataclass(frozen=True)
class _Event:
    kind: Literal["done", "failed", "back"]
    node: int
    shard: int = 0  # rows


def simulate(rows: int, cluster: Cluster, lifetime: Callable[[], float]) -> Outcome:
    """Work through so many rows; `lifetime` draws the seconds from a node's start to its failure."""
    waiting = deque([cluster.shard_rows] * (rows // cluster.shard_rows))
    if rows % cluster.shard_rows:
        waiting.append(rows % cluster.shard_rows)
    nodes = [_Node(number, cluster, lifetime) for number in range(cluster.nodes)]
    idle, events, order = deque(nodes), list[tuple[float, int, _Event]](), count()
    now = committed = 0.0
    while rows:
        while waiting and idle:
            for at, event in idle.popleft().take(waiting, now):
                heapq.heappush(events, (at, next(order), event))
        now, _, event = heapq.heappop(events)
        if event.kind == "failed":
            waiting.appendleft(event.shard)
            continue
        idle.append(nodes[event.node])
        if event.kind == "done":
            committed = max(committed, now) + event.shard / cluster.writer_rows_per_second
            rows -= event.shard
    return Outcome(committed, sum(node.failures for node in nodes), round(sum(node.lost_rows for node in nodes)))


class _Node:
    def __init__(self, number: int, cluster: Cluster, lifetime: Callable[[], float]) -> None:
        self._number, self._cluster, self._lifetime = number, cluster, lifetime
        self._fails_at = lifetime()
        self.failures, self.lost_rows = 0, 0.0

    def take(self, waiting: deque[int], now: float) -> list[tuple[float, _Event]]:
        """Begin the next shard, unless the node failed while it was idle; what will come of it, and when."""
        restart = self._cluster.restart_seconds
        while self._fails_at + restart <= now:
            self._fails_at += restart + self._lifetime()
        if self._fails_at <= now:
            return [(self._back_at(), _Event("back", self._number))]
        shard, rate = waiting.popleft(), self._cluster.rows_per_second
        if self._fails_at >= now + shard / rate:
            return [(now + shard / rate, _Event("done", self._number, shard))]
        self.failures += 1
        self.lost_rows += (self._fails_at - now) * rate
        failed = (self._fails_at, _Event("failed", self._number, shard))
        return [failed, (self._back_at(), _Event("back", self._number))]

    def _back_at(self) -> float:
        back_at = self._fails_at + self._cluster.restart_seconds
        self._fails_at = back_at + self._lifetime()
        return back_at


def exponential(per_day: float, seed: int) -> Callable[[], float]:
    """Lifetimes of a node that fails `per_day` times a day whatever its age; 0: never."""
    draw = random.Random(seed)
    return (lambda: draw.expovariate(per_day / DAY)) if per_day else (lambda: float("inf"))


# --- hours and bytes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Rows, and the mean tokens of a prompt, template included, and of an answer."""

    rows: int
    prompt: int
    answer: int


def gpu_hours(sizes: ModelSizes, gpu: Gpu, corpus: Corpus) -> dict[str, float | None]:
    """Hours of one GPU by stage; None where the weights do not fit.

    `start` is the closed form's one pass over all queries, `epoch` one pass of gradient steps over all rows. The
    teacher is the backbone itself.
    """
    rows, length = corpus.rows, corpus.prompt + COMPRESSION_TOKENS
    answering = answer_seconds(sizes, gpu, "bfloat16", rows, corpus.prompt, corpus.answer)
    row = step_flops(sizes, [(corpus.prompt, corpus.answer)], compression_tokens=COMPRESSION_TOKENS)
    flops = {
        "embed": read_flops(sizes, rows * corpus.answer, corpus.answer),
        "start": read_flops(sizes, rows * length, length),
        "epoch": float(rows * row),
    }
    hours = {stage: asked / (gpu.flops * COMPUTE_SHARE) / HOUR for stage, asked in flops.items()}
    return {"generate": None if answering is None else answering / HOUR, **hours}


def disk_bytes(width: int, corpus: Corpus) -> dict[str, float]:
    """Bytes of each artifact, and of the work folder's copies, for targets of `width` dimensions."""
    rows = corpus.rows
    queries = rows * (BYTES_PER_ROW + BYTES_PER_TOKEN * corpus.prompt)
    responses = rows * (BYTES_PER_ROW + BYTES_PER_TOKEN * corpus.answer)
    return {
        "queries": queries,
        "responses": responses,
        "targets": rows * (2.0 * width + BYTES_PER_ROW),
        "work/generate": responses,
        "work/embed": rows * (4.0 * width + BYTES_PER_ROW),
    }


def plan(corpus: Corpus, gpu: Gpu, names: list[str]) -> list[dict[str, Any]]:
    """A line for each preset: hours of one GPU by stage, and terabytes."""
    lines = []
    for name in names:
        sizes = presets()[name].sizes
        hours = {key: None if value is None else round(value) for key, value in gpu_hours(sizes, gpu, corpus).items()}
        disk = {key: round(value / TB, 2) for key, value in disk_bytes(sizes.hidden, corpus).items()}
        lines.append({"backbone": name, **hours, **{f"{key} TB": value for key, value in disk.items()}})
    return lines


def main() -> None:
    """Print the plan and the simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--prompt", type=int, default=100, help="mean tokens, template included")
    parser.add_argument("--answer", type=int, default=370, help="mean tokens")
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--backbones", nargs="+", default=["qwen3-0.6b", "qwen3-4b", "qwen3-8b"], choices=presets())
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--failures", type=float, default=2.0, help="of a node, a day")
    parser.add_argument("--restart", type=float, default=600.0, help="seconds until a node works again")
    parser.add_argument("--shard", type=int, nargs="+", default=[512, 4096, 65536], help="rows handed over together")
    parser.add_argument("--writer", type=float, default=3500.0, help="rows a second that the driver commits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    corpus = Corpus(arguments.rows, arguments.prompt, arguments.answer)
    lines = plan(corpus, GPUS[arguments.gpu], arguments.backbones)
    print_table(f"{arguments.gpu} hours and terabytes, {arguments.rows:,} rows, computed", lines)
    runs = [run for line in lines if line["generate"] for run in _runs(line, arguments)]
    show(f"generate on {arguments.nodes} nodes, simulated", runs, {"plan": lines, "runs": runs})


def _runs(line: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The simulation of one backbone with each size of a shard."""
    rate = arguments.gpus * arguments.rows / (line["generate"] * HOUR)
    runs = []
    for shard in arguments.shard:
        cluster = Cluster(arguments.nodes, rate, shard, arguments.restart, arguments.writer)
        found = simulate(arguments.rows, cluster, exponential(arguments.failures, arguments.seed))
        runs.append(
            {
                "backbone": line["backbone"],
                "shard rows": shard,
                "days": round(found.seconds / DAY, 2),
                "without failures": round(arguments.rows / (rate * arguments.nodes) / DAY, 2),
                **{key.replace("_", " "): value for key, value in asdict(found).items() if key != "seconds"},
            }
        )
    return runs


if __name__ == "__main__":
    main()
