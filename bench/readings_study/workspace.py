"""Workspaces of the study: queries, the backbone's own answers, tasks and params."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import REAL_DATA, ROOT
from bench.readings_study.tasks import write_tasks

MAX_TOKENS = 192  # of a text: longer ones lose their end
REDTEAM = "hh_harmless_first_turns"
STAGES = {"collect": "queries", "generate": "responses"}


@dataclass(frozen=True)
class Settings:
    """What a workspace is made of.

    Attributes:
        rows: queries, `heldout` of them (a share) held out; `sources` are names in the folder queries of the data.
        query_tokens: the longest query; `tokens`: of an answer at most.
        redteam: share of red-team first turns among the queries.
        others: documents of SciFact that no claim is judged against.
    """

    backbone: Path
    rows: int
    heldout: float
    sources: Sequence[str]
    query_tokens: int
    tokens: int
    redteam: float
    engine: str
    others: int


def prepare(folder: Path, settings: Settings, data: Path | None) -> None:
    """Tasks, params, queries and answers; `data`: the workspace whose queries and answers are taken."""
    (folder / "data" / "sources").mkdir(parents=True, exist_ok=True)
    write_params(folder, settings, write_tasks(folder / "tasks", settings.others))
    if data:
        for name in STAGES.values():
            shutil.copytree(data / "data" / name, folder / "data" / name, dirs_exist_ok=True)
    else:
        for source in sources(settings):
            shutil.copy(REAL_DATA / "queries" / source["path"], folder / "data" / "sources")
    for stage, made in STAGES.items():
        if not (folder / "data" / made / "manifest.json").is_file():
            run(f"pipeline.{stage}", folder)


def sources(settings: Settings) -> list[dict[str, Any]]:
    """Sections of `collect.sources`; weighted only where red-team turns have a share of their own."""
    weights = dict.fromkeys(settings.sources, (1 - settings.redteam) / len(settings.sources))
    if settings.redteam:
        weights[REDTEAM] = settings.redteam
    return [
        {
            "kind": "local",
            "path": f"{name}.parquet",
            "column": "text",
            **({"weight": weight} if settings.redteam else {}),
        }
        for name, weight in weights.items()
    ]


def write_params(folder: Path, settings: Settings, suites: Mapping[str, Sequence[str]]) -> None:
    """The demo's params with this backbone, these queries and tasks."""
    from ruamel.yaml import YAML

    yaml = YAML()
    params: Any = yaml.load((ROOT / "params.demo.yaml").read_text(encoding="utf-8"))
    params["backbone"]["name"] = str(settings.backbone.resolve())
    params["collect"] |= {
        "local_dir": "data/sources",
        "sources": sources(settings),
        "max_tokens": settings.query_tokens,
        "decontaminate": None,
        "sample": settings.rows,
        "heldout_fraction": settings.heldout,
    }
    options = {"engine": settings.engine, "max_new_tokens": settings.tokens, "options": {}, "dtype": "bfloat16"}
    params["generate"] |= options
    params["train"] |= {"template": "chat", "pool": "tokens", "max_query_tokens": MAX_TOKENS}
    params["evaluate"] |= {"local_dir": "tasks", "dtype": "bfloat16"}
    params["suites"] = {name: {"local": list(tasks)} for name, tasks in suites.items()}
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def run(module: str, workspace: Path, *arguments: str) -> None:
    """A command of the pipeline in the workspace."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=workspace, env=environment, check=True)
