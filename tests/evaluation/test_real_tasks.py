"""Unmodified mteb tasks on real data, beside the same data as local folders. They run in a process of their own,
because the cache of data sets is chosen when the libraries are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.realdata]

SCORE = """
import json, sys, zlib
from pathlib import Path
import numpy as np
from pipeline.evaluation.instructions import load_instructions
from pipeline.evaluation.running import run_systems
from pipeline.evaluation.suites import find_tasks
from pipeline.evaluation.summary import summary_table, task_scores
from pipeline.evaluation.systems import BareSystem

class Words:
    identity = {"name": "words"}
    def embed(self, texts):
        rows = np.zeros((len(texts), 512), dtype=np.float32)
        for row, text in zip(rows, texts):
            for word in text.lower().split():
                rows_at = zlib.crc32(word.encode()) % 512
                row[rows_at] += 1
        return rows

class SentenceTransformers:
    def __init__(self, path):
        from sentence_transformers import SentenceTransformer
        self.identity, self.model = {"name": path}, SentenceTransformer(path, device="cpu")
    def embed(self, texts):
        return self.model.encode(list(texts), batch_size=32)

names, folders, work, model = json.loads(sys.argv[1])
teacher = SentenceTransformers(model) if model else Words()
tasks = find_tasks([Path(folder) for folder in folders], names)
system = BareSystem("teacher", teacher.identity, teacher)
runs = run_systems([system], tasks, load_instructions(), work=Path(work), batch_size=32, dtype="float32")
print(json.dumps(task_scores(summary_table(tasks, runs))["teacher"]))
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


def scores(
    names: list[str], folders: list[Path], home: Path, work: Path, model: Path | None = None
) -> dict[str, float]:
    """Score of each task in a process with its own data set cache."""
    argument: Any = [names, [str(folder) for folder in folders], str(work), str(model) if model else None]
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


@pytest.mark.models
@pytest.mark.slow
def test_all_minilm_has_its_published_score(hub: Path, hf_home: Path, small_teacher: Path, tmp_path: Path) -> None:
    found = scores(["STSBenchmark"], [hub / "stsbenchmark-sts"], hf_home, tmp_path / "work", small_teacher)
    assert found["STSBenchmark"] == pytest.approx(0.8203, abs=0.002)
    assert found["stsbenchmark-sts"] == pytest.approx(found["STSBenchmark"], abs=1e-6)
