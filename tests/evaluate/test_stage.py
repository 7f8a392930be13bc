"""The stages evaluate and probe on systems whose scores are known by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pipeline.evaluate.__main__ as evaluate_stage
import pipeline.probe.__main__ as probe_stage
from pipeline.core.artifacts import create, open_artifact
from tests.evaluate.fakes import WordSystem, retrieval_folder, sts_folder

PARAMS: dict[str, Any] = {
    "backbone": {"name": "nobody/lm", "dtype": "float32"},
    "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 32},
    "embed": {"teacher": {"kind": "hash"}, "normalize": False, "dtype": "float32"},
    "evaluate": {
        "systems": ["student", "teacher"],
        "local_dir": "tasks",
        "batch_size": 4,
        "dtype": "float32",
    },
    "suites": {"small": {"local": ["find", "pairs"], "tasks": [], "benchmark": None}},
    "probes": {"safety": {"local": "find", "top_k": [1, 5]}, "reasoning": {"local": ["find"], "tasks": []}},
}


class Ready:
    """Stands for `Systems`: a student that is always right, a teacher that is always one word off."""

    def __init__(self) -> None:
        self.made = {"student": WordSystem(), "teacher": WordSystem("teacher", shift=1)}

    def build(self, names: Sequence[str]) -> Any:
        return (self.made[name] for name in names)

    def close(self) -> None:
        pass


@pytest.fixture
def systems(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Ready:
    """A workspace with params, tasks and an encoder; the systems are fakes."""
    ready = Ready()
    for stage in (evaluate_stage, probe_stage):
        monkeypatch.setattr(stage, "make_systems", lambda _: ready)
    retrieval_folder(workspace / "tasks" / "find")
    sts_folder(workspace / "tasks" / "pairs")
    write_params()
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        (out.path / "student.safetensors").write_bytes(b"weights")
    return ready


def write_params(**changes: Any) -> None:
    Path("params.yaml").write_text(json.dumps({**PARAMS, **changes}))


def call(stage: Any, *arguments: str) -> Any:
    import typer

    app = typer.Typer()
    app.command()(stage.main)
    return CliRunner().invoke(app, list(arguments))


def test_a_suite_becomes_an_artifact_and_a_record(systems: Ready) -> None:
    assert call(evaluate_stage, "small").exit_code == 0
    artifact = open_artifact(Path("results/evaluate/small"), "evaluation")
    assert sum(artifact.read("summary.parquet")["main"].to_pylist()) == 4
    assert artifact.read("deltas.parquet").num_rows == 6
    record = json.loads(Path("results/evaluate/small.json").read_text())
    assert record["metrics"]["student/find"] == 1.0
    assert record["metrics"]["delta/find"] == pytest.approx(1 - record["metrics"]["teacher/find"])
    (delta,) = (found for found in record["deltas"] if found["metric"] == "find")
    assert delta["system"] == "teacher" and delta["verdict"] == "better" and delta["low"] > 0
    assert record["systems"]["teacher"]["prompting"] == "none"
    assert record["systems"]["student"]["tasks_run_now"] == 2
    assert list(Path("results/evaluate/small").rglob("model_meta.json"))


def test_a_rerun_computes_nothing_and_gives_equal_bytes(systems: Ready) -> None:
    call(evaluate_stage, "small")
    before = Path("results/evaluate/small/manifest.json").read_bytes()
    calls = len(systems.made["student"].calls)
    assert call(evaluate_stage, "small").exit_code == 0
    assert Path("results/evaluate/small/manifest.json").read_bytes() == before
    assert len(systems.made["student"].calls) == calls


def test_a_killed_run_keeps_its_finished_tasks(systems: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(texts: Any, instruction: str, side: str = "query") -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(systems.made["teacher"], "encode", die)
        interrupted = call(evaluate_stage, "small")
    assert interrupted.exit_code == 130 and not Path("results/evaluate/small").exists()
    calls = len(systems.made["student"].calls)
    assert call(evaluate_stage, "small").exit_code == 0
    assert len(systems.made["student"].calls) == calls


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["large"], {}, "suites.large: missing (there are: small)"),
        (["small"], {"suites": {"small": {"local": []}}}, "names no task"),
        (["small"], {"suites": {"small": {"local": ["fnd"]}}}, "tasks/fnd: no such folder of a local data set"),
        (["small"], {"suites": {"small": {"tasks": ["STS12"]}}}, "the data of 1 of 1 tasks cannot be loaded"),
    ],
)
def test_mistakes_are_one_message(systems: Ready, arguments: list[str], changes: dict[str, Any], message: str) -> None:
    write_params(**changes)
    done = call(evaluate_stage, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not Path("results/evaluate").exists()


def test_without_an_encoder_nothing_is_run(systems: Ready) -> None:
    (Path("models/encoder") / "student.safetensors").write_bytes(b"flipped")
    for stage, name in ((evaluate_stage, "small"), (probe_stage, "safety")):
        done = call(stage, name)
        assert done.exit_code == 1 and "models/encoder/student.safetensors: sha256" in done.stderr


@pytest.mark.parametrize(("name", "metric"), [("safety", "student/accuracy@1"), ("reasoning", "student/find")])
def test_a_probe_becomes_an_artifact_and_a_record(systems: Ready, name: str, metric: str) -> None:
    assert call(probe_stage, name).exit_code == 0
    artifact = open_artifact(Path("results/probe") / name, "probe")
    assert artifact.read("rows.parquet").num_rows > 0
    result = json.loads((artifact.path / "result.json").read_text())
    record = json.loads(Path(f"results/probe/{name}.json").read_text())
    assert result["metrics"] == record["metrics"] and result["metrics"][metric] == 1.0
    assert artifact.read("deltas.parquet").to_pylist() == record["deltas"] != []
    before = artifact.digest
    assert call(probe_stage, name).exit_code == 0
    assert open_artifact(Path("results/probe") / name, "probe").digest == before


def test_an_unknown_probe_is_refused(systems: Ready) -> None:
    done = call(probe_stage, "kindness")
    assert done.exit_code == 1 and "probes.kindness: missing (there are: safety, reasoning)" in done.stderr
