"""Unmodified mteb tasks on real data, beside the same data as local folders. They run in a process of their own,
because the cache of data sets is chosen when the libraries are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.artifacts import create
from tests.conftest import ROOT

pytestmark = [pytest.mark.realdata, pytest.mark.slow]

SCORE = """
import json, sys, zlib
from pathlib import Path
import numpy as np
from pipeline.tasks.instructions import load_instructions
from pipeline.evaluate.run import run_systems
from pipeline.tasks.suites import find_tasks
from pipeline.evaluate.summary import summary_table, task_scores
from pipeline.evaluate.system import BareSystem

class Words:
    identity = {"name": "words"}
    def embed(self, texts):
        rows = np.zeros((len(texts), 512), dtype=np.float32)
        for row, text in zip(rows, texts):
            for word in text.lower().split():
                rows_at = zlib.crc32(word.encode()) % 512
                row[rows_at] += 1
        return rows

names, folders, work = json.loads(sys.argv[1])
teacher = Words()
tasks = find_tasks([Path(folder) for folder in folders], names)
system = BareSystem("teacher", teacher.identity, teacher)
runs = run_systems([system], tasks, load_instructions(), work=Path(work), dtype="float32")
print(json.dumps(task_scores(summary_table(tasks, runs))["teacher"]))
"""

CHECK = """
from pipeline.tasks.availability import check_data
from pipeline.tasks.suites import find_tasks
from pipeline.core.run import user_errors
with user_errors():
    check_data(find_tasks([], ["STSBenchmark", "STS12", "SciFact", "STS14"]))
"""


@pytest.fixture(scope="module")
def hub(real_data_root: Path) -> Path:
    return real_data_root / "hub" / "mteb"


@pytest.fixture(scope="module")
def real_data_root() -> Path:
    from tests.conftest import REAL_DATA

    if not (REAL_DATA / "hub" / "mteb" / "scifact").is_dir():
        pytest.skip("real data not here: set REAL_DATA to its folder")
    return REAL_DATA


@pytest.fixture(scope="module")
def hf_home(real_data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = real_data_root.parent / "tools" / "install_datasets_cache.py"
    if not script.is_file():
        pytest.skip(f"{script.name} is not beside the real data")
    home = tmp_path_factory.mktemp("hf")
    subprocess.run([sys.executable, script, real_data_root / "hub", home], check=True, capture_output=True)
    return home


def scores(names: list[str], folders: list[Path], home: Path, work: Path) -> dict[str, float]:
    """Score of each task in a process with its own data set cache."""
    argument: Any = [names, [str(folder) for folder in folders], str(work)]
    done = subprocess.run(
        [sys.executable, "-c", SCORE, json.dumps(argument)],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_local_folders_score_as_the_mteb_tasks_of_the_same_data(hub: Path, hf_home: Path, tmp_path: Path) -> None:
    names = ["STSBenchmark", "STS13", "SciFact"]
    folders = [hub / "stsbenchmark-sts", hub / "sts13-sts", hub / "scifact"]
    found = scores(names, folders, hf_home, tmp_path / "work")
    for name, folder in zip(names, folders, strict=True):
        assert found[folder.name] == pytest.approx(found[name], abs=1e-6)
        assert 0.1 < found[name] < 0.9


def evaluate(workspace: Path, home: Path, model: Path, tasks: list[str]) -> dict[str, Any]:
    """The record of the stage, run as a user runs it, with all-MiniLM-L6-v2 as the one system."""
    params = {
        "backbone": {"name": "nobody/lm"},
        "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 64},
        "embed": {"teacher": {"kind": "hash"}, "normalize": False, "dtype": "float32"},
        "evaluate": {
            "systems": ["minilm"],
            "models": {"minilm": {"name": str(model), "max_tokens": 256}},
            "local_dir": "tasks",
            "dtype": "float32",
        },
        "suites": {"real": {"tasks": tasks}},
    }
    (workspace / "params.yaml").write_text(json.dumps(params))
    with create(workspace / "models/encoder", kind="encoder", params={}) as out:
        (out.path / "student.safetensors").write_bytes(b"not needed by this system")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate", "real"],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=workspace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((workspace / "results/evaluate/real.json").read_text())


@pytest.mark.models
@pytest.mark.parametrize(
    "published",
    [
        {"STSBenchmark": 0.8203, "STS13": 0.8060, "Banking77Classification": 0.8004},
        pytest.param(
            {"SciFact": 0.6451},
            marks=pytest.mark.skipif(
                "LONG_TESTS" not in os.environ, reason="5,183 documents, 7 minutes on two cores: set LONG_TESTS=1"
            ),
        ),
    ],
    ids=["short", "long"],
)
def test_all_minilm_has_its_published_scores_through_the_stage(
    published: dict[str, float], hf_home: Path, small_teacher: Path, workspace: Path
) -> None:
    record = evaluate(workspace, hf_home, small_teacher, list(published))
    found = {task: record["metrics"][f"minilm/{task}"] for task in published}
    assert found == pytest.approx(published, abs=0.0005)
    assert record["systems"]["minilm"]["tasks_run_now"] == len(published)


def test_a_filled_cache_and_a_missing_data_set(hf_home: Path, workspace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "error: the data of 2 of 4 tasks cannot be loaded:\n  STS12: mteb/sts12-sts at " in done.stderr
    assert done.returncode == 1 and "\n  STS14: mteb/sts14-sts at " in done.stderr
