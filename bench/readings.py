"""Readings of a backbone on parts of STSBenchmark, STS13, Banking77 and SciFact: the table of docs/results.md.

    .venv/bin/python bench/readings.py --workspace DIR [--backbone DIR] [--rows 1200] [--tokens 32] [-- OPTION ...]

The workspace gets Alpaca queries, the backbone's own answers and the parts of the tasks, where they are not there yet;
with --data DIR it gets the queries and answers of another workspace (the demo's .demo), whoever wrote them. Then
`python -m pipeline readings` runs in it with the options behind `--`. The last line has all-MiniLM-L6-v2 on the same
tasks. REAL_DATA names the folder of the data (hub/mteb/..., queries/...). One process, as many threads as
OMP_NUM_THREADS; a second call reads what the first one computed.

`--suite reasoning` scores a part of ARC-Challenge, whose corpus is the choices of all its questions. `--suite safety`
scores a part of AdvBench-IR: there the lower score is the better one. --redteam 0.25 makes a quarter of the queries
first turns of people who try to get harmful answers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.common import BACKBONE, REAL_DATA, ROOT, TEACHER

PAIRS = 200
CLASSES, TRAIN_EACH, TEST_EACH = 12, 12, 12
CLAIMS, OTHERS = 40, 40  # queries of a retrieval part, and documents of no such query
QUESTIONS = 60
MAX_TOKENS = 192
HELDOUT = 1 / 6
HUB = REAL_DATA / "hub" / "mteb"
TASKS = ("STSB-part", "STS13-part", "Banking77-part", "SciFact-part")
REASONING, SAFETY = "ARC-part", "AdvBench-part"
SEED = 0


def sample(table: pa.Table, count: int) -> pa.Table:
    """A random draw of rows, in their order."""
    return table.take(np.sort(np.random.default_rng(SEED).permutation(table.num_rows)[:count]))


def write_task(folder: Path, tables: Mapping[str, Mapping[str, pa.Table]]) -> None:
    """A local task: config -> split -> table."""
    lines = ["---", "configs:"]
    for config, splits in tables.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, table in splits.items():
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def pairs(name: str) -> dict[str, dict[str, pa.Table]]:
    """A draw of the pairs of an STS task's test split."""
    table = pq.read_table(HUB / name / "data" / "test.parquet").select(["sentence1", "sentence2", "score"])
    return {"default": {"test": sample(table, PAIRS)}}


def classes() -> dict[str, dict[str, pa.Table]]:
    """The first classes of Banking77, a draw of the texts of each."""
    splits = {}
    for split, each in (("train", TRAIN_EACH), ("test", TEST_EACH)):
        table = pq.read_table(HUB / "banking77" / "data" / f"{split}.parquet").select(["text", "label"])
        splits[split] = pa.concat_tables([sample(table.filter(pc.field("label") == c), each) for c in range(CLASSES)])
    return {"default": splits}


def searched(folder: Path) -> dict[str, dict[str, pa.Table]]:
    """A draw of a retrieval task's queries, their documents and a draw of others."""
    files = ("default/test.parquet", "queries/queries.parquet", "corpus/corpus.parquet")
    judgements, queries, corpus = (pq.read_table(folder / name) for name in files)
    queries = sample(queries.filter(pc.is_in(queries["_id"], judgements["query-id"].combine_chunks())), CLAIMS)
    judgements = judgements.filter(pc.is_in(judgements["query-id"], queries["_id"].combine_chunks()))
    own = pc.is_in(corpus["_id"], judgements["corpus-id"].combine_chunks())
    passages = pa.concat_tables([corpus.filter(own), sample(corpus.filter(pc.invert(own)), OTHERS)])
    return {"corpus": {"corpus": passages}, "queries": {"queries": queries}, "default": {"test": judgements}}


def questions() -> dict[str, dict[str, pa.Table]]:
    """A draw of ARC's questions with their choices."""
    table = pq.read_table(REAL_DATA / "reasoning" / "rarb_mcr_ARC-Challenge-test.parquet")
    return {"default": {"test": sample(table.select(["queries", "documents", "labels"]), QUESTIONS)}}


def write_tasks(folder: Path) -> None:
    """The parts of the tasks, unless they are there."""
    contents: dict[str, Callable[[], dict[str, dict[str, pa.Table]]]] = {
        TASKS[0]: lambda: pairs("stsbenchmark-sts"),
        TASKS[1]: lambda: pairs("sts13-sts"),
        TASKS[2]: classes,
        TASKS[3]: lambda: searched(HUB / "scifact"),
        REASONING: questions,
        SAFETY: lambda: searched(REAL_DATA / "hub" / "McGill-NLP" / "AdvBench-IR-chunked"),
    }
    for name, part in contents.items():
        if not (folder / name / "README.md").is_file():
            write_task(folder / name, part())


def sources(redteam: float) -> list[dict[str, Any]]:
    """Alpaca's instructions, and this share of red-team first turns."""
    weights = {"queries_alpaca": 1 - redteam, "hh_harmless_first_turns": redteam}
    found = [
        {"kind": "local", "path": f"{name}.parquet", "column": "text", "weight": weight}
        for name, weight in weights.items()
        if weight
    ]
    if len(found) == 1:
        del found[0]["weight"]
    return found


def write_params(path: Path, backbone: Path, rows: int, tokens: int, engine: str, redteam: float) -> None:
    """The demo's params with this backbone, these queries and tasks."""
    from ruamel.yaml import YAML

    yaml = YAML()
    params: Any = yaml.load((ROOT / "params.demo.yaml").read_text(encoding="utf-8"))
    params["backbone"]["name"] = str(backbone.resolve())
    params["collect"] |= {
        "local_dir": "data/sources",
        "sources": sources(redteam),
        "decontaminate": None,
        "sample": rows,
        "heldout_fraction": HELDOUT,
    }
    params["generate"] |= {"engine": engine, "max_new_tokens": tokens, "options": {}, "dtype": "bfloat16"}
    params["train"] |= {"template": "chat", "pool": "tokens", "max_query_tokens": MAX_TOKENS}
    params["evaluate"] |= {"local_dir": "tasks", "dtype": "bfloat16"}
    params["suites"] = {
        "parts": {"local": list(TASKS)},
        "short": {"local": [TASKS[0], *TASKS[2:]]},
        "reasoning": {"local": [REASONING]},
        "safety": {"local": [SAFETY]},
    }
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def ceiling(folder: Path) -> dict[str, Any]:
    """Scores of all-MiniLM-L6-v2, a labelled embedder, on the same tasks, and their mean with its interval."""
    from pipeline.core.bootstrap import BootstrapParams, delta_of
    from pipeline.evaluate.baselines import ModelSystem
    from pipeline.evaluate.deltas import sampled_mean
    from pipeline.evaluate.run import run_systems
    from pipeline.evaluate.summary import summary_table, task_scores
    from pipeline.tasks.instructions import load_instructions
    from pipeline.tasks.suites import find_tasks

    tasks = find_tasks([folder / "tasks" / name for name in TASKS])
    system = ModelSystem("minilm", str(TEACHER), revision=None, max_tokens=256, dtype="float32", batch_size=32)
    work = folder / ".work" / "readings"
    [found] = run_systems([system], tasks, load_instructions(), work=work, dtype="float32")
    settings = BootstrapParams()
    mean = delta_of("mean", "", sampled_mean(tasks, found, settings), settings)
    scores = task_scores(summary_table(tasks, [found]))["minilm"]
    return {"all-MiniLM-L6-v2": {"mean": [mean.delta, mean.low, mean.high], **scores}}


def run(module: str, workspace: Path, *arguments: str) -> None:
    """A command of the pipeline in the workspace."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=workspace, env=environment, check=True)


def main() -> None:
    """Prepare the workspace and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=ROOT / ".bench" / "readings")
    parser.add_argument("--backbone", type=Path, default=BACKBONE)
    parser.add_argument("--data", type=Path, help="a workspace whose queries and answers are used")
    parser.add_argument("--rows", type=int, default=1_200, help="queries, of which a sixth is held out")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--redteam", type=float, default=0.0, help="share of red-team first turns among the queries")
    parser.add_argument("--engine", default="vllm", help="that writes the answers")
    parser.add_argument("options", nargs="*", help="of python -m pipeline readings, behind --")
    arguments = parser.parse_args()
    folder = arguments.workspace
    (folder / "data" / "sources").mkdir(parents=True, exist_ok=True)
    if arguments.data:
        for name in ("queries", "responses"):
            shutil.copytree(arguments.data / "data" / name, folder / "data" / name, dirs_exist_ok=True)
    else:
        for source in sources(arguments.redteam):
            shutil.copy(REAL_DATA / "queries" / source["path"], folder / "data" / "sources")
    write_tasks(folder / "tasks")
    settings = arguments.backbone, arguments.rows, arguments.tokens, arguments.engine, arguments.redteam
    write_params(folder / "params.yaml", *settings)
    for stage in ("collect", "generate"):
        made = folder / "data" / ("queries" if stage == "collect" else "responses") / "manifest.json"
        if not made.is_file():
            run(f"pipeline.{stage}", folder)
    suite = [] if "--suite" in arguments.options else ["--suite", "parts"]
    run("pipeline", folder, "readings", *suite, *arguments.options)
    print(json.dumps(ceiling(folder)))


if __name__ == "__main__":
    main()
