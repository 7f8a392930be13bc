"""What the benchmarks share: a table for people, one JSON line for programs, and child processes that are measured."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = ROOT / "models" / "SmolLM2-135M-Instruct"
TEACHER = ROOT / "models" / "all-MiniLM-L6-v2"
QUERIES = ROOT / "data" / "demo" / "queries" / "queries.jsonl"
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))


def prepare_models() -> None:
    """Make the small real models unless they are there."""
    if not (BACKBONE.is_dir() and TEACHER.is_dir()):
        subprocess.run([sys.executable, ROOT / "scripts" / "prepare_models.py"], check=True)


def demo_queries(count: int) -> list[str]:
    """The first queries of the demo."""
    lines = QUERIES.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def text_stream() -> list[int]:
    """The demo's documents as one row of token ids."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(BACKBONE)("\n".join(_demo_texts()), verbose=False)["input_ids"])


def _demo_texts() -> Iterator[str]:
    for path in sorted((ROOT / "data" / "demo" / "tasks").rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield str(json.loads(line).get("text", ""))


@dataclass(frozen=True)
class Finished:
    """A child process that ended well: its last line as JSON, and wall seconds."""

    result: Any
    seconds: float


def run(command: Sequence[str], **environment: str) -> Finished:
    """Run a script of this project in a process of its own; its last line is JSON.

    Raises:
        SystemExit: it failed; its stderr is shown.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate()
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{err[-4000:]}")
    return Finished(json.loads(out.strip().splitlines()[-1]), seconds)


def show(title: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Print the table and, as the last line, the result."""
    print_table(title, rows)
    print(json.dumps(dict(result)))


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that have the same keys."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else str(value) for value in row.values()))
    Console(width=140).print(table)
