"""Stages as subprocesses in a scratch workspace: inputs, params, kills and what is left on the disk."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.core.artifacts import create
from pipeline.core.fault_points import VARIABLE
from pipeline.core.files import bytes_sha256
from pipeline.core.schemas import QUERIES, RESPONSES
from tests.conftest import ROOT

RESPONSE = {"finish_reason": "stop", "prompt_tokens": 3, "response_tokens": 3, "error": None}


def row_id(text: str) -> str:
    """An id as queries have it."""
    return bytes_sha256(text.encode())[:32]


def write_queries(texts: Iterable[str], params: dict[str, Any] | None = None) -> None:
    """data/queries with every tenth text held out; `params` are the manifest's."""
    rows = [{"id": row_id(text), "text": text, "source": "test"} for text in texts]
    with create(Path("data/queries"), kind="queries", params=params or {}) as out:
        for split, chosen in (("train", [r for i, r in enumerate(rows) if i % 10]), ("heldout", rows[::10])):
            table = pa.Table.from_pylist(sorted(chosen, key=lambda row: row["id"]), schema=QUERIES)
            out.write_table(f"{split}.parquet", table)


def write_responses(texts: Iterable[str], **overrides: dict[str, Any]) -> None:
    """data/responses with one row a text; `overrides` maps a text to columns that differ."""
    rows = [{"id": row_id(text), "response": text, **RESPONSE, **overrides.get(text, {})} for text in texts]
    with create(Path("data/responses"), kind="responses", params={}) as out:
        out.write_parts([pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]), schema=RESPONSES)], RESPONSES)


def write_params(**sections: Any) -> None:
    """params.yaml with these sections."""
    with Path("params.yaml").open("w") as file:
        YAML().dump(sections, file)


def start(stage: str) -> "subprocess.Popen[str]":
    """The stage in the current folder, as a user starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"pipeline.{stage}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(stage: str) -> str:
    """Run the stage to its end and give its stderr."""
    process = start(stage)
    stderr = errors_of(process)
    assert process.returncode == 0, stderr
    return stderr


def errors_of(process: "subprocess.Popen[str]") -> str:
    """What a stage wrote to stderr until it ended; one that does not end is killed."""
    try:
        return process.communicate(timeout=300)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


def foreign_lines(log: str) -> list[str]:
    """Lines of a stage's log that are neither events nor progress."""
    return [line for line in log.splitlines() if not re.match(r"(INFO|WARNING) |[\w .-]+: +\d+(%\||\w+ \[)", line)]


def killed(stage: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage until it kills itself at a point of `pipeline.core.fault_points`."""
    with monkeypatch.context() as patched:
        patched.setenv(VARIABLE, point)
        process = start(stage)
    errors_of(process)
    assert process.returncode == -signal.SIGKILL, point


def shards(stage: str) -> list[Path]:
    """The committed shards of a stage's work."""
    return sorted(Path(".work", stage).glob("*/*.parquet"))


def kept_rows(stage: str) -> int:
    """Rows that are safe on the disk."""
    return sum(pq.read_metadata(shard).num_rows for shard in shards(stage))


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    """Poll until `condition` holds while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
