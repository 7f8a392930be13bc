"""The command sweep: params of each experiment, and a queue that DVC really runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench.fault_campaign import workspace as tiny
from pipeline.__main__ import app
from pipeline.cli.presets import presets
from pipeline.cli.sweep import absolute_models, changed_params, experiment_name
from pipeline.compare.runs import open_run
from pipeline.core.config import read_yaml
from pipeline.core.errors import ParamsError
from tests.conftest import ROOT
from tests.stage_runs import write_params


@pytest.fixture
def params(workspace: Path) -> Path:
    """params.yaml of the demo."""
    return Path(shutil.copy(ROOT / "params.demo.yaml", workspace / "params.yaml"))


def test_in_the_block_the_params_are_the_presets_and_behind_it_the_files(params: Path) -> None:
    before = params.read_bytes()
    with changed_params("qwen3-0.6b", 24) as changes:
        content = read_yaml(params)
        assert content["backbone"]["name"] == presets()["qwen3-0.6b"].backbone.name
        assert content["embed"]["teacher"]["kind"] == "llm2vec"
        assert any(line.startswith("backbone.name: models/") for line in changes)
    assert params.read_bytes() == before


def test_a_file_goes_over_the_params_key_by_key(params: Path, tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("train: {learning_rate: 2.0e-5, warm_start: {rows: 64}}\n")
    before = read_yaml(params)
    with changed_params("fast.yaml", 80) as changes:
        content = read_yaml(params)
    assert changes == ["train.learning_rate: 1e-05 -> 2e-05", "train.warm_start.rows: None -> 64"]
    assert content["train"] == {
        **before["train"], "learning_rate": 2e-5, "warm_start": {"enabled": True, "ridge": "auto", "rows": 64}
    }  # fmt: skip


@pytest.mark.parametrize("value", [2.0e-5, 2.34e-5, 0.35, 0.123456, 1.0, 1e-9, 0.0])
def test_a_number_keeps_its_digits_in_either_yaml(params: Path, tmp_path: Path, value: float) -> None:
    (tmp_path / "rate.yaml").write_text(f"train: {{weight_decay: {value:.17f}}}\n")
    with changed_params("rate.yaml", 80):
        line = next(line for line in params.read_text().splitlines() if "weight_decay" in line)
        assert yaml.safe_load(line) == {"weight_decay": value}  # YAML 1.1
        assert read_yaml(params)["train"]["weight_decay"] == value


def test_mistakes_are_found_before_anything_runs_and_leave_the_file(params: Path, tmp_path: Path) -> None:
    before = params.read_bytes()
    (tmp_path / "wrong.yaml").write_text("train: {learning_rat: 2.0e-5}\n")
    for name, message in (("wrong.yaml", "train.learning_rat"), ("gone.yaml", "gone.yaml"), ("gpt", "'gpt'")):
        with pytest.raises(ParamsError, match=message), changed_params(name, 80):
            pass
        assert params.read_bytes() == before


def test_a_relative_model_folder_becomes_an_absolute_one(workspace: Path) -> None:
    (workspace / "models/own").mkdir(parents=True)
    params = {"backbone": {"name": "models/own", "dtype": "float32"}, "embed": {"teacher": {"name": "org/teacher"}}}
    assert absolute_models(params) == {"backbone": {"name": str(workspace / "models/own")}}


def test_adapters_in_relative_folders_become_absolute_ones(workspace: Path) -> None:
    (workspace / "models/mntp").mkdir(parents=True)
    hub = {"name": "org/simcse", "revision": "abc"}
    params = {"embed": {"teacher": {"adapters": [{"name": "models/mntp", "revision": None}, hub]}}, "seeds": [0, 1]}
    own = {"name": str(workspace / "models/mntp"), "revision": None}
    assert absolute_models(params) == {"embed": {"teacher": {"adapters": [own, hub]}}}


def test_a_list_of_a_file_replaces_that_of_the_params(params: Path, tmp_path: Path) -> None:
    source = {"kind": "local", "path": "other.jsonl"}
    lists = {"evaluate": {"systems": ["student"], "seeds": [0, 1]}, "collect": {"sources": [source]}}
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump(lists))
    with changed_params("lists.yaml", 80) as changes:
        content = read_yaml(params)
    assert [content["evaluate"]["systems"], content["evaluate"]["seeds"]] == [["student"], [0, 1]]
    assert content["collect"]["sources"] == [source]
    assert any(line.startswith("evaluate.systems: ['") and line.endswith("-> ['student']") for line in changes)


def test_a_file_gives_an_experiment_its_name() -> None:
    assert [experiment_name(name) for name in ("qwen3-0.6b", "a/small.yaml")] == ["qwen3-0.6b", "small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen3-0.6b"], "NAME...: qwen3-0.6b: give two or more"),
        (["a.yaml", "b/a.yaml"], "NAME...: a.yaml, b/a.yaml"),
        (["qwen3-0.6b", "qwen3-4b", "--output", "x.pdf"], "--output: 'x.pdf'"),
    ],
)
def test_what_cannot_be_compared_is_refused(params: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["sweep", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


# --- with DVC -------------------------------------------------------------------------------------------------------

STAGE = """\
stages:
  evaluate:
    cmd: python stage.py
    deps: [stage.py]
    params: [backbone.name, train.seed]
    outs: [results/evaluate/demo]
    metrics: [{results/evaluate/demo.json: {cache: false}}]
"""
# Scores of the student by the seed; a seed of 9 fails. The live figures are those of a real tracker.
CODE = """\
from pathlib import Path

from pipeline.core.config import read_yaml
from pipeline.core.tracking import tracking
from tests.compare.runs import write_run

text = Path("params.yaml").read_text()
seed = read_yaml(Path("params.yaml"))["train"]["seed"]
assert seed != 9
with tracking("dvclive", "evaluate", resume=False) as log:
    log({"loss": 0.25 * seed}, 1)
write_run(Path(), [0.25 * seed, 0.25 * seed, 0.5], params=text)
"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def repository(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace, for git and DVC with settings of their own."""
    settings = {
        "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "DVC_GLOBAL_CONFIG_DIR": str(workspace / ".g"),
        "DVC_SITE_CACHE_DIR": str(workspace / ".s"),
        **{f"GIT_{who}_{what}": "someone@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (workspace / ".gitignore").write_text("/.g\n/.s\n/.work\n/sets\n/results/evaluate/demo\n__pycache__\n")
    (workspace / "sets").mkdir()
    return workspace


def commit_all() -> None:
    run("git", "init", "--quiet")
    run(sys.executable, "-m", "dvc", "init", "--quiet")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "a project")


@pytest.fixture
def project(params: Path, repository: Path) -> Path:
    """A git repository whose pipeline is one quick stage, and a file of params for each of three seeds."""
    (repository / "dvc.yaml").write_text(STAGE)
    (repository / "stage.py").write_text(CODE)
    for seed in (1, 2, 9):
        (repository / f"sets/seed-{seed}.yaml").write_text(f"train: {{seed: {seed}}}\n")
    commit_all()
    return repository


def sweep(*names: str) -> "subprocess.CompletedProcess[str]":
    files = [f"sets/{name}.yaml" for name in names]
    command = [sys.executable, "-m", "pipeline", "sweep", *files, "--output", "compare.json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_sweep_ends_in_the_comparison(project: Path) -> None:
    params = Path("params.yaml").read_bytes()
    done = sweep("seed-1", "seed-2", "seed-9")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: no results of seed-9" in done.stderr
    found = json.loads(Path("compare.json").read_text())
    assert found["runs"] == ["seed-1", "seed-2"]
    assert found["params"] == {"train.seed": [1, 2]}
    assert Path("params.yaml").read_bytes() == params
    # The experiments keep what was tracked while they ran.
    shown = json.loads(run(sys.executable, "-m", "dvc", "exp", "show", "--json"))
    revisions = [found for base in shown for each in base["experiments"] or [] for found in each["revs"]]
    [metrics] = [found["data"]["metrics"] for found in revisions if found["name"] == "seed-2"]
    assert metrics["results/live/evaluate/metrics.json"]["data"] == {"loss": 0.5, "step": 1}
    again = sweep("seed-1", "seed-2")
    assert again.returncode == 1 and "dvc exp remove" in again.stderr


@pytest.mark.slow
def test_a_sweep_runs_every_stage_on_each_backbone(repository: Path, tiny_backbone: Callable[..., Path]) -> None:
    """The pipeline as it is, on tiny random backbones of two architectures, a few texts and one task."""
    names = ["llama", "qwen3"]
    tiny.make(repository, tiny_backbone("llama"))
    params = read_yaml(Path("params.yaml"))
    params["backbone"]["revision"] = None
    write_params(**params, teach=read_yaml(ROOT / "params.demo.yaml")["teach"])
    shutil.copytree(ROOT / "pipeline", "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for name in names:
        Path(f"sets/{name}.yaml").write_text(f"backbone: {{name: {tiny_backbone(name)}}}\n")
    commit_all()
    done = sweep(*names)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path("compare.json").read_text())
    assert found["runs"] == names
    assert found["params"] == {"backbone.name": [str(tiny_backbone(name)) for name in names]}
    assert set(found["tables"]) == {"suite small", "probe safety"}
    scores = [cell["score"] for cell in found["tables"]["suite small"]["mean/tasks"]]
    records = [open_run(name).records()["evaluate small"] for name in names]
    assert scores == pytest.approx([record["metrics"]["student/mean/tasks"] for record in records])
    assert scores[0] != scores[1]
