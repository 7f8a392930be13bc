"""The stages evaluate and probe on systems whose scores are known by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import pipeline.evaluate.__main__ as evaluate_stage
import pipeline.probe.__main__ as probe_stage
from pipeline.core.artifacts import create, open_artifact
from pipeline.encoder.folder.config import EncoderConfig
from tests.conftest import tiny_model, tiny_tokenizer
from tests.evaluate.fakes import WordSystem, retrieval_folder, sts_folder

PARAMS: dict[str, Any] = {
    "backbone": {"name": "nobody/lm", "dtype": "float32"},
    "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 32},
    "embed": {"teacher": {"kind": "hash"}, "normalize": False, "dtype": "float32"},
    "evaluate": {
        "systems": ["student", "teacher"],
        "local_dir": "tasks",
        "dtype": "float32",
    },
    "suites": {"small": {"local": ["find", "pairs"], "tasks": [], "benchmark": None}},
    "probes": {"safety": {"local": "find", "top_k": [1, 5]}, "reasoning": {"local": ["find"], "tasks": []}},
}


class FakeSystems:
    """Stands for `Systems`: a student that is always right, a teacher that is always one word off."""

    def __init__(self) -> None:
        self.made = {"student": WordSystem(), "teacher": WordSystem("teacher", shift=1)}
        self.standardizations: dict[str, Any] = {}

    def build(self, names: Sequence[str]) -> Any:
        return (self.made[name] for name in names)

    def close(self) -> None:
        pass


@pytest.fixture
def systems(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystems:
    """A workspace with params, tasks and an encoder; the systems are fakes."""
    fakes = FakeSystems()
    for stage in (evaluate_stage, probe_stage):
        monkeypatch.setattr(stage, "make_systems", lambda _: fakes)
    retrieval_folder(workspace / "tasks" / "find")
    sts_folder(workspace / "tasks" / "pairs")
    write_params()
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        (out.path / "student.safetensors").write_bytes(b"weights")
    return fakes


def write_params(**changes: Any) -> None:
    Path("params.yaml").write_text(json.dumps({**PARAMS, **changes}))


def call(stage: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(stage.main)
    return CliRunner().invoke(app, list(arguments))


def test_a_suite_becomes_an_artifact_and_a_record(systems: FakeSystems) -> None:
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


def test_smaller_vectors_have_a_table_of_their_own(systems: FakeSystems) -> None:
    config = EncoderConfig(
        backbone={"name": "none"}, chat_template_kwargs={}, template="raw", max_query_tokens=9,
        compression_tokens=1, thought_tokens=0, hidden=4, width=8, teacher={},
    )  # fmt: skip
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        (out.path / "encoder_config.json").write_text(config.model_dump_json())
    evaluate = {**PARAMS["evaluate"], "stored": [{"truncate_dim": 1}, {"quantize": "binary"}]}
    write_params(evaluate=evaluate)
    assert call(evaluate_stage, "small").exit_code == 0
    record = json.loads(Path("results/evaluate/small.json").read_text())
    whole, cut, signs = record["stored"]
    assert [(form["stored"], form["dimensions"]) for form in (whole, cut, signs)] == [
        ("float32", 8), ("float32", 1), ("binary", 8),
    ]  # fmt: skip
    assert whole["scores"]["find"] == record["metrics"]["student/find"] == signs["scores"]["find"] == 1
    (lost,) = (delta for delta in cut["deltas"] if delta["metric"] == "find")
    assert lost["delta"] == pytest.approx(cut["scores"]["find"] - 1) and lost["verdict"] == "worse"
    assert set(record["systems"]) == {"student", "teacher"}
    assert not any("student-" in metric for metric in record["metrics"])
    write_params(evaluate={**evaluate, "stored": [{"quantize": "int8"}, {"truncate_dim": 9}]})
    done = call(evaluate_stage, "small")
    assert "evaluate.stored.1.truncate_dim: 9 of 8 dimensions" in done.stderr


def test_a_rerun_computes_nothing_and_gives_equal_bytes(systems: FakeSystems) -> None:
    call(evaluate_stage, "small")
    before = Path("results/evaluate/small/manifest.json").read_bytes()
    calls = len(systems.made["student"].calls)
    assert call(evaluate_stage, "small").exit_code == 0
    assert Path("results/evaluate/small/manifest.json").read_bytes() == before
    assert len(systems.made["student"].calls) == calls


def test_a_killed_run_keeps_its_finished_tasks(systems: FakeSystems, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (["x;touch y"], {"suites": {"x;touch y": {"local": ["find"]}}}, "suites.x;touch y"),
        (["small"], {"suites": {"small": {"local": ["fnd"]}}}, "tasks/fnd: no such folder of a local data set"),
        (["small"], {"suites": {"small": {"tasks": ["STS12"]}}}, "the data of 1 of 1 tasks cannot be loaded"),
    ],
)
def test_mistakes_are_one_message(
    systems: FakeSystems, arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    write_params(**changes)
    done = call(evaluate_stage, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not Path("results/evaluate").exists()


def test_without_an_encoder_nothing_is_run(systems: FakeSystems) -> None:
    (Path("models/encoder") / "student.safetensors").write_bytes(b"flipped")
    for stage, name in ((evaluate_stage, "small"), (probe_stage, "safety")):
        done = call(stage, name)
        assert done.exit_code == 1 and "models/encoder/student.safetensors: sha256" in done.stderr


@pytest.mark.parametrize(("name", "metric"), [("safety", "student/accuracy@1"), ("reasoning", "student/find")])
def test_a_probe_becomes_an_artifact_and_a_record(systems: FakeSystems, name: str, metric: str) -> None:
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


def test_an_unknown_probe_is_refused(systems: FakeSystems) -> None:
    done = call(probe_stage, "kindness")
    assert done.exit_code == 1 and "probes.kindness: missing (there are: safety, reasoning)" in done.stderr


def write_models(backbone: Path) -> None:
    """An encoder that no step has trained, and a sentence-transformers model of letters."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from pipeline.backbone.loading import identify
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.folder.write import write_encoder
    from pipeline.encoder.student import new_student

    config = EncoderConfig(
        backbone=identify(str(backbone), None), chat_template_kwargs={}, template="raw", max_query_tokens=96,
        compression_tokens=2, thought_tokens=0, hidden=32, width=16, teacher={},
    )  # fmt: skip
    student = new_student(tiny_model("llama"), 16, compression_tokens=2, thought_tokens=0, seed=9)
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        write_encoder(out, student, tiny_tokenizer(), config, rows=1, steps=1)
    torch.manual_seed(0)
    static = StaticEmbedding(tiny_tokenizer(), embedding_dim=8)
    SentenceTransformer(modules=[static], prompts={"query": "find: "}, device="cpu").save("models/letters")


def test_every_system_runs_the_same_suite(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    retrieval_folder(workspace / "tasks" / "find")
    backbone = tiny_backbone("llama")
    write_models(backbone)
    systems = ["student", "teacher", "untrained", "backbone-mean", "echo", "hyde", "letters"]
    content = {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "generate": {"engine": "transformers", "dtype": "float32", "max_new_tokens": 4, "max_prompt_tokens": 96},
        "embed": {"teacher": {"kind": "hash", "options": {"width": 16}}},
        "evaluate": {
            "systems": systems,
            "local_dir": "tasks",
            "dtype": "float32",
            "seeds": [0, 5],
            "models": {"letters": {"name": "models/letters"}},
        },
        "suites": {"small": {"local": ["find"]}},
    }
    Path("params.yaml").write_text(json.dumps(content))
    done = call(evaluate_stage, "small")
    assert done.exit_code == 0, done.output
    record = json.loads(Path("results/evaluate/small.json").read_text())
    assert set(record["systems"]) == {*systems, "untrained-5"}
    prompting = {system: facts["prompting"] for system, facts in record["systems"].items()}
    assert prompting["student"] == prompting["untrained-5"] == "generative instruction"
    assert prompting["teacher"] == prompting["backbone-mean"] == "bare text"
    assert prompting["letters"] == "query prompt 'find: ', document prompt ''"
    assert {delta["system"] for delta in record["deltas"]} == {*record["systems"]} - {"student"}
    assert record["seeds"]["find"]["seeds"] == 2
    assert len({facts["revision"] for facts in record["systems"].values()}) == len(record["systems"])
