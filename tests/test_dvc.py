"""dvc.yaml lists exactly the code that each stage imports, and an edit reruns what depends on it and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.params import read_yaml
from scripts.dvc_deps import closure, differences, stage_deps, updated
from tests.conftest import ROOT


def test_code_deps_of_every_stage_equal_its_imports() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert differences(text, updated(ROOT, text)) == [], "run: python scripts/dvc_deps.py --write"


@pytest.mark.parametrize("file", ["params.yaml", "params.demo.yaml"])
def test_dvc_accepts_both_params_files_and_finds_every_key(workspace: Path, file: str) -> None:
    lay_out(workspace, file)
    listed = dvc(workspace, "stage", "list", "--name-only").split()
    params = read_yaml(workspace / "params.yaml")
    entries = [f"evaluate@{key}" for key in params["suites"]] + [f"probe@{key}" for key in params["probes"]]
    assert listed == ["collect", "generate", "teach", "embed", "train", *entries, "report"]
    dry = dvc(
        workspace, "repro", "--dry", "--force"
    )  # without --force DVC 3.67 wants to hash deps that are not made yet
    chain = ("collect", "generate", "teach", "embed", "train", "report")
    positions = [dry.index(f"pipeline.stages.{stage}") for stage in chain]
    assert positions == sorted(positions)
    assert dry.index("pipeline.stages.evaluate") < positions[-1]


def stages_with(dep: str) -> set[str]:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    return {name for name, stage in stages.items() if dep in stage.get("do", stage)["deps"]}


def test_an_edit_reaches_only_the_stages_that_use_it() -> None:
    assert stages_with("pipeline/training/trainer.py") == {"train"}
    assert stages_with("pipeline/queries.py") == {"collect", "report"}
    assert stages_with("pipeline/probes/${key}.py") == {"probe"}
    assert not stages_with("pipeline/probes/safety.py")
    assert stages_with("pipeline/stages/report.py") == {"report"}
    assert stages_with("pipeline/audit/__init__.py") == {"report"}
    assert stages_with("pipeline/evaluation/suites.yaml") >= {"collect", "evaluate"}


def test_no_stage_persists_its_outs() -> None:
    assert "persist" not in (ROOT / "dvc.yaml").read_text()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "pipeline/__init__.py": '"""A package."""\n',
        "pipeline/stages/__init__.py": "",
        "pipeline/stages/go.py": "from pipeline.a import f\n\ndef run():\n    from pipeline.deep import late\n",
        "pipeline/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline import typed\n",
        "pipeline/deep/__init__.py": 'WHERE = {"x": "pipeline.named:Class"}\n',
        "pipeline/deep/late.py": "from pipeline import b\nX = path.with_name('table.yaml'), 'no.yaml'\n",
        "pipeline/b.py": "import pipeline.a\n",
        "pipeline/named.py": "X = 1\n",
        "pipeline/typed.py": "X = 1\n",
        "pipeline/unused.py": "X = 1\n",
        "pipeline/deep/table.yaml": "x: 1\n",
        "pipeline/deep/other.yaml": "x: 1\n",
        "pipeline/probes/one.py": "import pipeline.b\nPARAMS = 1\n",
        "pipeline/probes/two.py": "PARAMS = 1\n",
        "pipeline/probes/shared.py": "X = 1\n",
        "pipeline/stages/probe.py": "X = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_closure_follows_late_imports_packages_and_names_in_strings(package: Path) -> None:
    assert closure(package, "pipeline.stages.go") == {
        "pipeline/__init__.py",
        "pipeline/stages/go.py",
        "pipeline/a.py",
        "pipeline/b.py",
        "pipeline/deep/__init__.py",
        "pipeline/deep/late.py",
        "pipeline/deep/table.yaml",
        "pipeline/named.py",
    }


def test_probes_are_keyed_and_what_they_import_is_common(package: Path) -> None:
    assert stage_deps(package, "python -m pipeline.stages.probe ${key}") == [
        "pipeline/__init__.py",
        "pipeline/a.py",
        "pipeline/b.py",
        "pipeline/probes/${key}.py",
        "pipeline/stages/probe.py",
    ]


def test_update_keeps_comments_and_other_deps(package: Path) -> None:
    text = (
        "# top\nstages:\n  go:\n    cmd: python -m pipeline.stages.go   # runs\n    deps:\n      - data/in   # mine\n"
        "      - pipeline/gone.py\n\n    outs:\n      - data/out\n"
    )
    after = updated(package, text)
    for kept in ("# top", "# runs", "- data/in", "- data/out", "- pipeline/named.py"):
        assert kept in after
    assert "gone" not in after
    assert updated(package, after) == after


def lay_out(workspace: Path, params: str) -> None:
    """A workspace as the user's, with every file that dvc.yaml names."""
    shutil.copytree(ROOT / "pipeline", workspace / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", workspace / "dvc.yaml")
    shutil.copy(ROOT / params, workspace / "params.yaml")
    content = read_yaml(workspace / "params.yaml")
    for section in ("collect", "evaluate"):
        folder = workspace / content[section]["local_dir"]
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("x")
    dvc(workspace, "init", "--no-scm")


def dvc(workspace: Path, *arguments: str) -> str:
    places = {"DVC_GLOBAL_CONFIG_DIR": str(workspace / ".g"), "DVC_SITE_CACHE_DIR": str(workspace / ".s")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace,
        env={**os.environ, "DVC_NO_ANALYTICS": "1", **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
