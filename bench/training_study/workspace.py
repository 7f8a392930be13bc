"""Queries, answers and targets to study, made by the pipeline's own stages where they are not there yet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import BACKBONE, QUERIES, REAL_DATA, ROOT, TEACHER

ALPACA = REAL_DATA / "queries" / "queries_alpaca.parquet"
ROWS = 4_400
STAGES = ("collect", "generate", "embed")


def prepare_workspace(folder: Path) -> None:
    """Run the data stages in `folder` unless they ran: 4,400 Alpaca queries where those are, else the demo's 1,050."""
    if (folder / "data" / "targets" / "manifest.json").is_file():
        return
    source = ALPACA if ALPACA.is_file() else QUERIES
    (folder / "data" / "sources").mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / "data" / "sources" / source.name)
    _write_params(folder / "params.yaml", source.name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for stage in STAGES:
        print(f"preparing {folder}: {stage}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", f"pipeline.{stage}"], cwd=folder, env=environment, check=True)


def _write_params(path: Path, source: str) -> None:
    """The demo's params with the study's queries and longer answers."""
    from ruamel.yaml import YAML

    yaml = YAML()
    params: Any = yaml.load((ROOT / "params.demo.yaml").read_text(encoding="utf-8"))
    params["backbone"]["name"], params["embed"]["teacher"]["name"] = str(BACKBONE), str(TEACHER)
    params["collect"] |= {
        "local_dir": "data/sources",
        "sources": [{"kind": "local", "path": source, "column": "text"}],
        "decontaminate": None,
        "sample": ROWS,
    }
    params["generate"]["max_new_tokens"] = 64
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
