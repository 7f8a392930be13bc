"""DVC's own ways with real stages: push to a remote, clone, pull, and nothing is computed again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.config import read_yaml
from tests.conftest import ROOT
from tests.stage_runs import write_params

pytestmark = pytest.mark.slow

ARTIFACTS = ("data/queries", "data/responses", "data/targets")


def run(workspace: Path, *command: str) -> str:
    """A command in a workspace; its output."""
    local = {"DVC_GLOBAL_CONFIG_DIR": str(workspace / ".g"), "DVC_SITE_CACHE_DIR": str(workspace / ".s")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=workspace, env={**os.environ, "DVC_NO_ANALYTICS": "1", "PATH": path, **local},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(workspace: Path, *arguments: str) -> str:
    return run(workspace, sys.executable, "-m", "dvc", *arguments)


def git(workspace: Path, *arguments: str) -> str:
    return run(workspace, "git", "-c", "user.name=Someone", "-c", "user.email=someone@localhost", *arguments)


@pytest.fixture
def project(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    """A git repository of a project whose queries, responses and targets are made, by stubs, and committed."""
    project = workspace / "project"
    shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, project / name)
    os.chdir(project)
    params = read_yaml(ROOT / "params.demo.yaml")
    params["backbone"]["name"] = str(tiny_backbone("llama"))
    params["collect"] |= {"local_dir": "data/sources", "sample": None, "decontaminate": None, "near_duplicates": None}
    params["generate"] |= {"engine": "echo", "options": {}}
    params["embed"] = {"teacher": {"kind": "hash"}, "normalize": False, "dtype": "float32"}
    write_params(**params)
    for folder, name in (("data/sources", "queries.jsonl"), (params["evaluate"]["local_dir"], "README.md")):
        Path(folder).mkdir(parents=True)
        Path(folder, name).write_text("".join(f'{{"text": "question number {index}"}}\n' for index in range(30)))
    git(project, "init", "--quiet")
    dvc(project, "init", "--quiet")
    dvc(project, "repro", "embed")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "a run")
    return project


def test_a_clone_pulls_what_was_pushed_and_has_nothing_to_do(project: Path, workspace: Path) -> None:
    dvc(project, "remote", "add", "--default", "store", str(workspace / "remote"))
    git(project, "commit", "--quiet", "--all", "--message", "a remote")
    dvc(project, "push")
    clone = workspace / "clone"
    git(workspace, "clone", "--quiet", str(project), str(clone))
    assert not (clone / "data/responses").exists()
    dvc(clone, "pull", "embed", "--with-deps")
    for name in ARTIFACTS:
        files = {path.name: path.read_bytes() for path in (project / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (clone / name).iterdir()}
    assert "up to date" in dvc(clone, "status", "embed", "--with-deps")
    assert "didn't change" in dvc(clone, "repro", "embed")
    audited = run(clone, sys.executable, "-m", "pipeline", "audit")
    assert "no findings in 4 artifacts" in audited


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_outs_that_are_links_into_the_cache_are_read_and_written_again(project: Path, kind: str) -> None:
    dvc(project, "config", "cache.type", kind)
    dvc(project, "checkout", "--relink", "--with-deps", "embed")
    before = (project / "data/targets/part-00000.parquet").read_bytes()
    run(project, sys.executable, "-m", "pipeline", "audit")
    dvc(project, "repro", "--force", "--single-item", "embed")
    assert (project / "data/targets/part-00000.parquet").read_bytes() == before
    assert "up to date" in dvc(project, "status", "embed", "--with-deps")
