"""Queries, answers and targets to study, made by the pipeline's own stages where they are not there yet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import BACKBONE, QUERIES, REAL_DATA, ROOT, TEACHER

ALPACA = REAL_DATA / "queries" / "queries_alpaca.parquet"
ROWS, TOKENS = 4_400, 64
STAGES = ("collect", "generate", "embed")


def prepare_workspace(folder: Path, rows: int = ROWS, tokens: int = TOKENS) -> None:
    """Run the data stages in `folder` unless they ran: Alpaca queries where those are, else the demo's 1,050.

    `tokens` is the most of an answer; targets are those of all-MiniLM-L6-v2.
    """
    if (folder / "data" / "targets" / "manifest.json").is_file():
        return
    source = ALPACA if ALPACA.is_file() else QUERIES
    (folder / "data" / "sources").mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / "data" / "sources" / source.name)
    _write_params(folder / "params.yaml", source.name, rows, tokens)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for stage in STAGES:
        print(f"preparing {folder}: {stage}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", f"pipeline.{stage}"], cwd=folder, env=environment, check=True)


def _write_params(path: Path, source: str, rows: int, tokens: int) -> None:
    """The demo's params with the study's queries, answers and teacher."""
    from ruamel.yaml import YAML

    yaml = YAML()
    params: Any = yaml.load((ROOT / "params.demo.yaml").read_text(encoding="utf-8"))
    params["backbone"]["name"] = str(BACKBONE)
    params["embed"] |= {
        "teacher": {"kind": "sentence-transformers", "name": str(TEACHER), "max_tokens": 256},
        "transform": {"kind": "none"},
    }
    params["collect"] |= {
        "local_dir": "data/sources",
        "sources": [{"kind": "local", "path": source, "column": "text"}],
        "decontaminate": None,
        "sample": rows,
    }
    params["generate"]["max_new_tokens"] = tokens
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
