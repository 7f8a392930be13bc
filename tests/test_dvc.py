"""dvc.yaml lists all code that a stage imports, and an edit reruns what depends on it and nothing else."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.code_digest import import_closure
from pipeline.core.config import read_yaml
from pipeline.probe.descriptions import probe_names
from tests.conftest import ROOT

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]


def code_deps(stage: str, key: str = "") -> list[Path]:
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    return [Path(dep.replace("${key}", key)) for dep in deps if dep.startswith("pipeline/")]


def modules() -> Iterator[tuple[str, str, list[str]]]:
    """Stage, key and the modules that it runs; the stage `probe` imports the probe that its key names."""
    for stage in STAGES:
        for key in probe_names() if stage == "probe" else [""]:
            yield stage, key, [f"pipeline.{stage}.__main__", *([f"pipeline.probe.{key}"] if key else [])]


def closure(names: list[str]) -> set[Path]:
    """The import closure without files that hold a docstring and nothing else."""
    return {path for path in import_closure(names, ROOT) if decides(ROOT / path)}


def decides(path: Path) -> bool:
    return any(not isinstance(statement, ast.Expr) for statement in ast.parse(path.read_bytes()).body)


def covers(dep: Path, path: Path) -> bool:
    return path == dep or dep in path.parents


@pytest.mark.parametrize(("stage", "key", "names"), list(modules()))
def test_the_import_closure_of_a_stage_lies_in_its_code_deps(stage: str, key: str, names: list[str]) -> None:
    deps = code_deps(stage, key)
    assert not [path.as_posix() for path in closure(names) if not any(covers(dep, path) for dep in deps)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_code_dep_of_a_stage_is_used(stage: str) -> None:
    ways = [(key, closure(names)) for other, key, names in modules() if other == stage]
    used = {dep for key, files in ways for dep in code_deps(stage, key) if any(covers(dep, path) for path in files)}
    listed = {dep for key, _ in ways for dep in code_deps(stage, key) if dep.suffix != ".yaml"}
    assert used >= listed


@pytest.fixture(scope="module", params=["params.yaml", "params.demo.yaml"])
def laid_out(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A workspace as the user's, with every file that dvc.yaml names."""
    workspace = tmp_path_factory.mktemp("dvc")
    shutil.copytree(ROOT / "pipeline", workspace / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in (("dvc.yaml", "dvc.yaml"), (request.param, "params.yaml"), (".dvcignore", ".dvcignore")):
        shutil.copy(ROOT / source, workspace / target)
    content = read_yaml(workspace / "params.yaml")
    for section in ("collect", "evaluate"):
        folder = workspace / content[section]["local_dir"]
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("x")
    dvc(workspace, "init", "--no-scm")
    return workspace


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


def test_dvc_accepts_both_params_files_and_finds_every_key(laid_out: Path) -> None:
    listed = dvc(laid_out, "stage", "list", "--name-only").split()
    params = read_yaml(laid_out / "params.yaml")
    entries = [f"evaluate@{key}" for key in params["suites"]] + [f"probe@{key}" for key in params["probes"]]
    assert listed == ["collect", "generate", "teach", "embed", "train", *entries, "report"]
    dry = dvc(
        laid_out, "repro", "--dry", "--force"
    )  # without --force DVC 3.67 wants to hash deps that are not made yet
    positions = [dry.index(f"pipeline.{stage}") for stage in STAGES]
    assert positions == sorted(positions)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the demo's stages whose outs are placeholders and are all up to date."""
    workspace = tmp_path_factory.mktemp("committed")
    shutil.copytree(ROOT / "pipeline", workspace / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in (("dvc.yaml", "dvc.yaml"), ("params.demo.yaml", "params.yaml"), (".dvcignore", ".dvcignore")):
        shutil.copy(ROOT / source, workspace / target)
    params = read_yaml(workspace / "params.yaml")
    keys = {"suites": params["suites"], "probes": params["probes"]}
    for stage in STAGES.values():
        body = stage.get("do", stage)
        names = [name for kind in ("outs", "metrics", "plots") for name in body.get(kind, [])]
        for key in keys[stage["foreach"][2:-1]] if "do" in stage else [""]:
            for name in names:
                path = workspace / (name if isinstance(name, str) else next(iter(name))).replace("${key}", key)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix:
                    path.write_text("{}")
                else:
                    path.mkdir()
                    (path / "manifest.json").write_text("{}")
    for section in ("collect", "evaluate"):
        (workspace / params[section]["local_dir"]).mkdir(parents=True, exist_ok=True)
        (workspace / params[section]["local_dir"] / "README.md").write_text("x")
    dvc(workspace, "init", "--no-scm")
    dvc(workspace, "commit", "--force")
    assert changed(workspace) == set()
    return workspace


def changed(workspace: Path) -> set[str]:
    """Stages that `dvc status` calls changed by their own code, without what follows from it."""
    import json

    return set(json.loads(dvc(workspace, "status", "--json")))


DEMO = read_yaml(ROOT / "params.demo.yaml")
EVALUATED = {f"evaluate@{key}" for key in DEMO["suites"]}
PROBED = {f"probe@{key}" for key in DEMO["probes"]}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("train/trainer.py", {"train"}),
        ("train/losses.py", {"train", *PROBED}),
        ("probe/safety.py", {"probe@safety"} & PROBED),
        ("probe/alignment.py", {"probe@alignment"} & PROBED),
        ("probe/passages.py", PROBED),
        ("report/render.py", {"report"}),
        ("report/report.j2", {"report"}),
        ("audit/chain.py", {"report"}),
        ("collect/rows.py", {"collect"}),
        ("generate/engines/vllm.py", {"generate", *EVALUATED, *PROBED}),
        ("lens/vocabulary.py", PROBED),
        ("export/publish.py", set()),
        ("cli/plan.py", set()),
        ("api.py", set()),
        ("core/artifacts.py", {"collect", "generate", "teach", "embed", "train", "report", *EVALUATED, *PROBED}),
    ],
)
def test_an_edit_reruns_only_the_stages_that_use_it(committed: Path, file: str, stages: set[str]) -> None:
    path = committed / "pipeline" / file
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    try:
        assert changed(committed) == stages
    finally:
        path.write_bytes(before)


def test_a_name_from_params_reaches_the_shell_in_quotes() -> None:
    commands = [STAGES[stage]["do"]["cmd"] for stage in ("evaluate", "probe")]
    assert commands == ["python -m pipeline.evaluate '${key}'", "python -m pipeline.probe '${key}'"]


def test_no_stage_persists_its_outs() -> None:
    assert "persist" not in (ROOT / "dvc.yaml").read_text()


def test_bytecode_is_no_change_of_the_demos_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "WORKSPACE", tmp_path)
    monkeypatch.setattr(demo, "MODELS", ())
    demo.lay_out()
    (tmp_path / "pipeline/core/__pycache__").mkdir()
    (tmp_path / "pipeline/core/__pycache__/text.cpython-311.pyc").write_bytes(b"bytecode")
    command = [sys.executable, "-m", "dvc", "check-ignore", "pipeline/core/__pycache__", "pipeline/core/text.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["pipeline/core/__pycache__"], done.stderr
