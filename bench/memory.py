"""Rows against time and memory of the data stages: collect, generate with the echo engine, embed with the hash teacher.

    .venv/bin/python bench/memory.py [--rows 10000 100000 1000000]

Queries are random words of the backbone's vocabulary, 100 tokens each, with one near-duplicate in a hundred. The stages
run as `dvc repro` starts them, in a scratch workspace; memory is the largest resident set of each process. The engine
and the teacher are stubs on purpose: what is measured is everything around them.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import BACKBONE, ROOT, prepare_models, show

STAGES = ("collect", "generate", "embed")
TOKENS = 100
LIMIT_MIB = 2048


def words() -> list[str]:
    """Whole words that are one token after a space."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(BACKBONE).get_vocab()
    return sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isascii() and token[1:].islower())


def write_queries(path: Path, rows: int) -> None:
    """`rows` queries; every hundredth is an earlier one with its last word changed."""
    vocabulary, source = words(), random.Random(0)
    before = [vocabulary[0]] * TOKENS
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            chosen = (
                [*before[:-1], source.choice(vocabulary)] if index % 100 == 99 else source.choices(vocabulary, k=TOKENS)
            )
            file.write(json.dumps({"text": " ".join(chosen)}) + "\n")
            before = chosen


def write_params(folder: Path) -> None:
    """A params file, in JSON, which is YAML."""
    params = {
        "backbone": {"name": str(BACKBONE), "dtype": "float32"},
        "collect": {
            "local_dir": "sources",
            "sources": [{"kind": "local", "path": "queries.jsonl", "column": "text"}],
            "max_tokens": 512,
            "near_duplicates": {},
        },
        "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": TOKENS, "max_prompt_tokens": 512},
        "embed": {"teacher": {"kind": "hash"}},
    }
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")


def run_stage(stage: str, folder: Path) -> tuple[float, int]:
    """Wall seconds and largest resident MiB of a stage.

    Raises:
        SystemExit: the stage failed.
    """
    started = time.monotonic()
    with (folder / f"{stage}.log").open("w") as log_file:
        command = [sys.executable, "-m", f"pipeline.{stage}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log_file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{stage} failed:\n{(folder / f'{stage}.log').read_text()[-4000:]}")
    return time.monotonic() - started, usage.ru_maxrss // 1024


def measure(rows: int) -> dict[str, tuple[float, int]]:
    """Seconds and MiB of each stage on so many rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sources").mkdir()
        # In a process of its own: what this one holds when it starts a stage counts as that stage's.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_queries, args=(folder / "sources" / "queries.jsonl", rows)
        )
        writer.start()
        writer.join()
        write_params(folder)
        return {stage: run_stage(stage, folder) for stage in STAGES}


def main() -> None:
    """Measure each size and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    prepare_models()
    table: list[dict[str, Any]] = []
    for rows in arguments.rows:
        for stage, (seconds, mib) in measure(rows).items():
            line = {
                "rows": rows,
                "stage": stage,
                "seconds": round(seconds, 1),
                "rows/s": round(rows / seconds),
                "MiB": mib,
            }
            table.append(line)
            print(line, file=sys.stderr)
    peak = max(line["MiB"] for line in table)
    result = {"peak_mib": peak, "within_2_gib": peak <= LIMIT_MIB, "stages": table}
    show("data stages, stub engine and teacher", table, result)


if __name__ == "__main__":
    main()
