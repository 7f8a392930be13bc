"""Rows against time and memory of the data stages: collect, generate with the echo engine, embed with the hash teacher.

    .venv/bin/python bench/memory.py [--rows 10000 100000 1000000] [--tokens 100] [--train] [--width 64] [--keep DIR]

Queries are random words of the backbone's vocabulary, `--tokens` each, with one near-duplicate in a hundred. The stages
run as `dvc repro` starts them, in a scratch workspace; memory is the largest resident set of each process, and bytes a
row are its growth from one size to the next. The engine and the teacher are stubs on purpose: what is measured is
everything around them. The digests of the artifacts tell whether two versions of the code write the same bytes.
--train adds the closed form and one step on a random backbone of one layer, which has the tokenizer.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import BACKBONE, ROOT, prepare_models, print_table

LEAST_ANSWER = 48  # tokens: the echo of a shorter answer would end within the chat template, equal for all rows
STAGES = {"collect": "data/queries", "generate": "data/responses", "embed": "data/targets"}
TRAIN = {"train": "models/encoder"}
LIMIT_MIB = 2048
LOOK_SECONDS = 0.02


def words() -> list[str]:
    """Whole words that are one token after a space."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(BACKBONE).get_vocab()
    return sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isascii() and token[1:].islower())


def write_queries(path: Path, rows: int, tokens: int) -> None:
    """`rows` queries of so many words; every hundredth is an earlier one with its last word changed."""
    vocabulary, source = words(), random.Random(0)
    before = [vocabulary[0]] * tokens
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            chosen = (
                [*before[:-1], source.choice(vocabulary)] if index % 100 == 99 else source.choices(vocabulary, k=tokens)
            )
            file.write(json.dumps({"text": " ".join(chosen)}) + "\n")
            before = chosen


def tiny_backbone(folder: Path, hidden: int) -> None:
    """A random model of one layer of `hidden` dimensions, with the real tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_params(folder: Path, backbone: Path, width: int, tokens: int) -> None:
    """A params file, in JSON, which is YAML: targets of `width` dimensions, answers of at most `tokens` tokens."""
    params = {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "collect": {
            "local_dir": "sources",
            "sources": [{"kind": "local", "path": "queries.jsonl", "column": "text"}],
            "max_tokens": 512,
            "near_duplicates": {},
        },
        "generate": {
            "engine": "echo",
            "dtype": "float32",
            "max_new_tokens": max(tokens, LEAST_ANSWER),
            "max_prompt_tokens": 512,
        },
        "embed": {"teacher": {"kind": "hash", "options": {"width": width}}},
        "train": {
            **{"compression_tokens": 10, "thought_tokens": 0, "template": "chat", "max_query_tokens": 512},
            **{"max_response_tokens": 512, "align_weight": 1.0, "recon_weight": 1.0, "align_reduction": "mean"},
            **{"warm_start": {"enabled": True, "rows": None, "ridge": 100.0}, "stop_after_steps": 1, "epochs": 1},
            **{"learning_rate": 1e-5, "weight_decay": 0.0, "warmup_steps": 0, "batch_size": 32, "seed": 0},
            **{"micro_batch_size": 64, "max_grad_norm": 1.0, "checkpoint_every": 100, "processes": 1},
        },
    }
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")


def run_stage(stage: str, folder: Path) -> dict[str, float]:
    """Wall seconds, processor seconds, the largest resident MiB of a stage, and the largest that are its own.

    The others are pages of files (libraries, model weights), which the system can drop and read again.

    Raises:
        SystemExit: the stage failed.
    """
    started = time.monotonic()
    with (folder / f"{stage}.log").open("w") as log_file:
        command = [sys.executable, "-m", f"pipeline.{stage}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log_file)
        status, usage, own = _watched(process.pid)
    if status:
        sys.exit(f"{stage} failed:\n{(folder / f'{stage}.log').read_text()[-4000:]}")
    seconds, processor = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    memory = {"MiB": usage.ru_maxrss // 1024, "own MiB": own // 2**20}
    return {"seconds": round(seconds, 1), "cpu s": round(processor, 1), **memory}


def _watched(pid: int) -> tuple[int, resource.struct_rusage, int]:
    """Wait for a process: its status, what it used, and the most memory that it shares with no file, in bytes."""
    own, looked_at = 0, psutil.Process(pid)
    while True:
        with contextlib.suppress(psutil.Error):
            memory = looked_at.memory_info()
            own = max(own, memory.rss - memory.shared)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage, own
        time.sleep(LOOK_SECONDS)


def measure(rows: int, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each stage on so many rows; `settings` are those of `main`."""
    keep, train, tokens = settings.keep, settings.train, settings.tokens
    workspace = contextlib.nullcontext(keep / str(rows)) if keep else tempfile.TemporaryDirectory()
    with workspace as name:
        folder = Path(name)
        (folder / "sources").mkdir(parents=True)
        # In a process of its own: what this one holds when it starts a stage counts as that stage's.
        _apart(write_queries, folder / "sources" / "queries.jsonl", rows, tokens)
        if train:
            _apart(tiny_backbone, folder / "backbone", settings.hidden)
        write_params(folder, folder / "backbone" if train else BACKBONE, settings.width, tokens)
        lines = []
        for stage, out in {**STAGES, **(TRAIN if train else {})}.items():
            measured = run_stage(stage, folder)
            manifest = json.loads((folder / out / "manifest.json").read_text())
            size = sum(file.stat().st_size for file in (folder / out).rglob("*"))
            found = {"disk bytes/row": round(size / rows), "sha256": manifest["sha256"][:12]}
            lines.append({"rows": rows, "stage": stage, **measured, **found})
            print(lines[-1], file=sys.stderr)
        return lines


def _apart(work: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} failed")


def growth(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes of a process's own memory and processor time that a row adds, between successive sizes."""
    lines = []
    for stage in dict.fromkeys(line["stage"] for line in table):
        sizes = [line for line in table if line["stage"] == stage]
        for small, large in itertools.pairwise(sizes):
            more = large["rows"] - small["rows"]
            added = round((large["own MiB"] - small["own MiB"]) * 2**20 / more)
            millis = round(1000 * (large["cpu s"] - small["cpu s"]) / more, 3)
            span = {"stage": stage, "from": small["rows"], "to": large["rows"]}
            lines.append({**span, "bytes/row": added, "cpu ms/row": millis})
    return lines


def main() -> None:
    """Measure each size and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=100, help="of a query, and at most of an answer")
    parser.add_argument("--width", type=int, default=64, help="dimensions of a target")
    parser.add_argument("--train", action="store_true", help="also the closed form")
    parser.add_argument("--hidden", type=int, default=16, help="dimensions of the backbone of --train")
    parser.add_argument("--keep", type=Path, help="an empty folder for the workspaces; default: they go")
    settings = parser.parse_args()
    prepare_models()
    table = [line for rows in settings.rows for line in measure(rows, settings)]
    peak = max(line["MiB"] for line in table)
    print_table("data stages, stub engine and teacher", table)
    result = {"peak_mib": peak, "within_2_gib": peak <= LIMIT_MIB, "stages": table, "growth": growth(table)}
    if result["growth"]:
        print_table("what a row adds", result["growth"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
