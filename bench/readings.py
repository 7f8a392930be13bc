"""Readings of a backbone, their closed forms by size of data, and what gradient steps add: docs/results.md.

    .venv/bin/python bench/readings.py --workspace DIR [--backbone DIR] [--rows 1200] [--tokens 32] [-- OPTION ...]

The workspace gets queries, the backbone's own answers and the tasks (bench/readings_study/tasks.py), where they are not
there yet; with --data DIR it gets those of another workspace (the demo's .demo), whose backbone must be the same.
Then `python -m pipeline readings` runs in it with the options behind `--`. The last line has all-MiniLM-L6-v2 on the
same tasks. REAL_DATA names the folder of the data (hub/mteb/..., queries/...). One process, as many threads as
OMP_NUM_THREADS; a second call reads what the first one computed.

--suite reasoning, safety or whole scores other tasks. --redteam 0.25 makes a quarter of the queries first turns of
people who try to get harmful answers.
--sizes 1000 4000 16000 measures the readings of --reading on disjoint draws of these sizes, in both forms.
--checkpoint FILE [OTHER ...] compares the student of a training with its own start, both in FILE, and with the students
of other checkpoints (bench/decoding.py leaves NAME.checkpoint, with --solve also NAME-refitted.checkpoint).
--prepare stops when queries and answers are there.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.common import BACKBONE, ROOT, TEACHER, show
from bench.readings_study.gradient import compare
from bench.readings_study.sizes import draws, measure_draws, table
from bench.readings_study.workspace import Settings, prepare, run


def ceiling(folder: Path, suite: str) -> dict[str, Any]:
    """Scores of all-MiniLM-L6-v2, a labelled embedder, on the tasks of a suite, and their mean with its interval."""
    from ruamel.yaml import YAML

    from pipeline.core.bootstrap import BootstrapParams, delta_of
    from pipeline.evaluate.baselines import ModelSystem
    from pipeline.evaluate.deltas import sampled_mean
    from pipeline.evaluate.run import run_systems
    from pipeline.evaluate.summary import summary_table, task_scores
    from pipeline.tasks.instructions import load_instructions
    from pipeline.tasks.suites import find_tasks

    names = YAML(typ="safe").load((folder / "params.yaml").read_text(encoding="utf-8"))["suites"][suite]["local"]
    tasks = find_tasks([folder / "tasks" / name for name in names])
    system = ModelSystem("minilm", str(TEACHER), revision=None, max_tokens=256, dtype="float32", batch_size=32)
    work = folder / ".work" / "readings"
    [found] = run_systems([system], tasks, load_instructions(), work=work, dtype="float32")
    settings = BootstrapParams()
    mean = delta_of("mean", "", sampled_mean(tasks, found, settings), settings)
    scores = task_scores(summary_table(tasks, [found]))["minilm"]
    return {"all-MiniLM-L6-v2": {"mean": [mean.delta, mean.low, mean.high], **scores}}


def by_size(folder: Path, arguments: argparse.Namespace) -> None:
    """The table of sizes."""
    wanted = draws(arguments.sizes, arguments.draws_of, arguments.draws)
    options = {"suite": arguments.suite, "readings": arguments.reading, "shares": arguments.share}
    if arguments.decorrelate:
        options["decorrelate"] = arguments.decorrelate
    if arguments.shrinkage is not None:
        options["shrinkage"] = arguments.shrinkage
    if arguments.decorrelate_reading:
        options["decorrelate_reading"] = True
    lines = measure_draws(folder, wanted, {**options, "refine": arguments.refine})
    show(f"Closed form by rows, {arguments.suite}", table(lines), {"draws": len(wanted)})


def after_steps(folder: Path, checkpoints: Sequence[Path], suite: str) -> None:
    """Student minus start, a line a metric."""
    found = compare(folder, [path.resolve() for path in checkpoints], suite)
    columns = ("metric", "system", "delta", "low", "high", "verdict")
    rows = [{key: delta[key] for key in columns} for delta in found["deltas"]]
    show(f"Student minus start after {found['steps']} steps", rows, found)


def main() -> None:
    """Prepare the workspace and run what is asked for."""
    arguments = parsed()
    folder = arguments.workspace.resolve()
    settings = Settings(
        backbone=arguments.backbone,
        rows=arguments.rows,
        heldout=arguments.heldout,
        sources=arguments.source or ["queries_alpaca"],
        query_tokens=arguments.query_tokens,
        tokens=arguments.tokens,
        redteam=arguments.redteam,
        engine=arguments.engine,
        others=arguments.others,
    )
    prepare(folder, settings, arguments.data)
    if arguments.checkpoint:
        after_steps(folder, arguments.checkpoint, arguments.suite)
    elif arguments.sizes:
        by_size(folder, arguments)
    elif not arguments.prepare:
        run("pipeline", folder, "readings", "--suite", arguments.suite, *arguments.options)
        print(json.dumps(ceiling(folder, arguments.suite)))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workspace", type=Path, default=ROOT / ".bench" / "readings")
    add("--backbone", type=Path, default=BACKBONE)
    add("--data", type=Path, help="a workspace whose queries and answers are used")
    add("--source", action="append", help="of queries: a name in the folder queries of the data; repeatable")
    add("--rows", type=int, default=1_200, help="queries")
    add("--heldout", type=float, default=1 / 6, help="share of them that is held out")
    add("--query-tokens", type=int, default=256, help="of a query at most")
    add("--tokens", type=int, default=32, help="of an answer at most")
    add("--redteam", type=float, default=0.0, help="share of red-team first turns among the queries")
    add("--engine", default="vllm", help="that writes the answers")
    add("--others", type=int, default=700, help="documents of the whole SciFact that no claim is judged against")
    add("--prepare", action="store_true", help="stop when queries and answers are there")
    add("--sizes", type=int, nargs="+", help="training rows of a draw")
    add("--draws", type=int, default=4, help="of a size at most")
    add("--draws-of", type=int, default=16_000, help="rows that the draws share out")
    add("--suite", default="parts", help="whose tasks are scored")
    add("--reading", nargs="+", default=["tokens", "echo", "twice-both"], help="of --sizes")
    add("--share", type=float, nargs="+", default=[0.3, 0.5, 1.0], help="of --sizes")
    add("--decorrelate", type=float, default=0.0, help="of the targets, with --sizes")
    add("--shrinkage", type=float, help="of --decorrelate; by default auto")
    add("--decorrelate-reading", action="store_true", help="as well as the targets, with --sizes")
    add("--refine", action="store_true", help="the closed form too, with --sizes")
    add("--checkpoint", type=Path, nargs="+", help="of a training: its student against its start and other students")
    add("options", nargs="*", help="of python -m pipeline readings, behind --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
