"""Workspaces of the train stage: its inputs, its params, and one in which it has run."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.backbone.loading import identify
from pipeline.core import schemas
from pipeline.core.artifacts import create
from pipeline.core.paths import HELDOUT_TABLE, QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR, TRAIN_TABLE
from pipeline.core.target_transform import TargetTransform
from pipeline.train.__main__ import main
from tests.conftest import ROOT

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

TRAIN: dict[str, Any] = {
    "compression_tokens": 2, "thought_tokens": 1, "template": "chat", "max_query_tokens": 64,
    "max_response_tokens": 32, "align_weight": 1.0, "recon_weight": 1.0, "align_reduction": "sum",
    "warm_start": {"enabled": True, "ridge": "auto"}, "learning_rate": 0.01, "weight_decay": 0.0,
    "warmup_steps": 2, "epochs": 3, "batch_size": 8, "micro_batch_size": 4, "max_grad_norm": 1.0,
    "checkpoint_every": 1, "seed": 0,
}  # fmt: skip


def write_inputs(backbone: Path, rows: int = 24, width: int = 6) -> None:
    """The three artifacts that train reads, in the current workspace."""
    ids = [f"{index:04x}" for index in range(rows)]
    queries = pa.table({"id": ids, "text": [f"query {i}" for i in ids], "source": ["t"] * rows}, schemas.QUERIES)
    with create(QUERIES_DIR, kind="queries", params={}) as out:
        out.write_table(TRAIN_TABLE, queries.slice(0, rows - 4))
        out.write_table(HELDOUT_TABLE, queries.slice(rows - 4))
    responses = [
        {"id": i, "response": f"answer {i}", "finish_reason": "stop", "prompt_tokens": 9, "response_tokens": 9}
        for i in ids
    ]
    models = {"backbone": identify(str(backbone), None)}
    with create(RESPONSES_DIR, kind="responses", params={}, models=models) as out:
        out.write_parts([pa.Table.from_pylist(responses, schemas.RESPONSES)], schemas.RESPONSES)
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    targets = [{"id": i, "embedding": vector.tolist()} for i, vector in zip(ids, vectors, strict=True)]
    write_targets(pa.Table.from_pylist(targets, schemas.targets_schema(width, "float32")))


def write_targets(
    table: pa.Table, teacher: dict[str, Any] | None = None, fitted: TargetTransform | None = None, **params: Any
) -> None:
    """data/targets of the current workspace; `params` are those of its manifest."""
    shutil.rmtree(TARGETS_DIR, ignore_errors=True)
    with create(TARGETS_DIR, kind="targets", params=params, models={"teacher": teacher or {"name": "t"}}) as out:
        out.write_parts([table], table.schema)
        if fitted is not None:
            fitted.save(out.path)


def write_params(backbone: Path, **train: Any) -> None:
    """params.yaml (JSON is YAML) of the current workspace."""
    content = {"backbone": {"name": str(backbone), "dtype": "float32"}, "train": {**TRAIN, **train}}
    Path("params.yaml").write_text(json.dumps(content))


def run_stage(code: int = 0, **environment: str) -> str:
    """Run the stage as a process of its own, which must end with `code`; its stderr."""
    command = [sys.executable, "-m", "pipeline.train"]
    done = subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture
def backbone(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    """A workspace with inputs and params; returns its backbone."""
    folder = tiny_backbone("qwen3")
    write_inputs(folder)
    write_params(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[..., Path]) -> Path:
    """A workspace in which the stage has run, on one thread as `run_stage` does; nobody may change it."""
    folder, threads = tmp_path_factory.mktemp("finished"), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        write_inputs(tiny_backbone("qwen3"))
        write_params(tiny_backbone("qwen3"))
        main(Path("params.yaml"))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def trained(finished: Path, workspace: Path) -> Path:
    """A workspace in which the stage has run, to be changed; the current directory."""
    shutil.copytree(finished, workspace, dirs_exist_ok=True)
    return workspace
