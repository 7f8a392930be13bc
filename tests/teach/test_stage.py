"""The teach stage on a tiny backbone: none asked for, a whole run, a killed run, and a teacher that is worse."""

import json
import logging
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.backbone.loading import BackboneParams, identify, load_backbone
from pipeline.core import fault_points
from pipeline.core.artifacts import open_artifact
from pipeline.core.config import load
from pipeline.core.errors import EvaluationError, TeacherError, section
from pipeline.core.run import RunRecord
from pipeline.embed.__main__ import app as embed_app
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.backbone import load_backbone_teacher
from pipeline.embed.teachers.load import load_teacher
from pipeline.teach import quality
from pipeline.teach.__main__ import Inputs, _load, app, run
from tests.conftest import ROOT
from tests.evaluate.fakes import write_folder
from tests.stage_runs import folder_bytes, start, write_params, write_queries, write_responses
from tests.teach.helpers import FAST, two_clusters

TEXTS = two_clusters(40)
TEACHER = {"kind": "llm2vec-trained", "max_tokens": 64, "batch_tokens": 512}


def write_inputs(backbone: Path, teacher: dict[str, Any] = TEACHER, **teach: Any) -> None:
    """The artifacts and params that the stage reads, and a task to measure on."""
    write_queries(TEXTS)
    write_responses(TEXTS)
    pairs = [
        {"sentence1": one, "sentence2": other, "score": float(index % 5)}
        for index, (one, other) in enumerate(zip(TEXTS[:20], TEXTS[3:23], strict=True))
    ]
    write_folder(Path("tasks/pairs"), {"default": {"test": pairs}})
    write_params(
        backbone={"name": str(backbone), "dtype": "float32"},
        collect={"local_dir": "."},
        embed={"teacher": teacher, "dtype": "float32"},
        teach={**FAST, **teach},
        evaluate={"local_dir": "tasks"},
    )


def teach() -> None:
    run(load(Path("params.yaml"), Inputs), RunRecord("teach"))


def test_where_none_is_asked_for_nothing_is_loaded(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write_inputs(tiny_backbone(), {"kind": "hash"})
    code = (
        "import sys; from pathlib import Path; from pipeline.core.run import record\n"
        "from pipeline.core.config import load; from pipeline.teach.__main__ import Inputs, run\n"
        "with record('teach') as facts: run(load(Path('params.yaml'), Inputs), facts)\n"
        "assert not {'torch', 'transformers', 'mteb'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, check=True)
    assert list(folder_bytes(Path("models/teacher"))) == ["manifest.json"]
    assert json.loads(Path("results/teach.json").read_text())["asked"] is False
    with pytest.raises(TeacherError, match="models/teacher holds no teacher: run teach again"):
        load_teacher(TeacherParams(**TEACHER), BackboneParams(name=str(tiny_backbone())))


@pytest.mark.slow
def test_a_trained_teacher_embeds_and_measuring_it_again_changes_no_byte(
    workspace: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_backbone("qwen3")
    write_inputs(folder, quality={"texts": 8})
    with caplog.at_level(logging.INFO):
        teach()
    assert "simcse: dropout 0.3 in {'attention': 3, 'lora': 21}" in caplog.text
    unmeasured = folder_bytes(Path("models/teacher"))
    write_inputs(folder, quality={"local": ["pairs"], "texts": 12, "bootstrap": {"resamples": 100}})
    assert CliRunner().invoke(app, []).exit_code == 0
    assert folder_bytes(Path("models/teacher")) == unmeasured
    artifact = open_artifact(Path("models/teacher"), "teacher")
    assert artifact.manifest.models == {"backbone": identify(str(folder), None)}
    assert set(artifact.manifest.inputs) == {"data/queries", "data/responses"}
    weights = ["adapter_config.json", "adapter_model.safetensors"]
    assert set(artifact.manifest.files) == {"README.md", *(f"{p}/{w}" for p in ("mntp", "simcse") for w in weights)}
    facts = json.loads(Path("results/teach.json").read_text())
    assert facts["mntp"]["steps"] == facts["simcse"]["steps"] == 6
    assert facts["metrics"].keys() >= {f"{name}/pairs" for name in ("backbone-mean", "mntp", "simcse")}
    assert {(delta["of"], delta["system"]) for delta in facts["deltas"]} == {
        ("mntp", "backbone-mean"), ("simcse", "backbone-mean"),
    }  # fmt: skip
    assert facts["intrinsic"]["simcse"].keys() == {"anisotropy", "uniformity", "alignment", "halves"}
    assert CliRunner().invoke(embed_app, []).exit_code == 0
    targets = open_artifact(Path("data/targets"), "targets")
    teacher = load_teacher(TeacherParams(**TEACHER), BackboneParams(name=str(folder)))
    adapters = [{**identify(f"models/teacher/{phase}", None)} for phase in ("mntp", "simcse")]
    assert targets.manifest.models["teacher"]["adapters"] == adapters == teacher.identity["adapters"]
    rows = {row["id"]: row["embedding"] for row in targets.read().to_pylist()}
    responses = open_artifact(Path("data/responses"), "responses").read().to_pylist()
    np.testing.assert_allclose(
        [rows[row["id"]] for row in responses], teacher.embed([row["response"] for row in responses]), atol=1e-4
    )
    with pytest.raises(TeacherError, match="was trained with backbone .* run teach again"):
        load_teacher(TeacherParams(**TEACHER), BackboneParams(name=str(tiny_backbone("llama"))))
    with pytest.raises(TeacherError, match="was trained with pooling mean, params say last"):
        load_teacher(TeacherParams(**TEACHER, pooling="last"), BackboneParams(name=str(folder)))


@pytest.mark.parametrize(
    ("teacher", "quality", "error", "message"),
    [
        (TEACHER, {"tasks": ["STSBenchmrk"]}, EvaluationError, r"^teach\.quality.*: mteb has no task 'STSBenchmrk'"),
        (TEACHER, {"local": ["pears"]}, EvaluationError, r"^teach\.quality.*: tasks/pears: no such folder .* pairs"),
        (TEACHER, {"local": ["broken"]}, EvaluationError, r"^teach\.quality.*broken"),
        (
            {**TEACHER, "max_tokens": 600},
            {},
            TeacherError,
            r"^embed\.teacher\.max_tokens: 600 exceeds .* 512 positions",
        ),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(
    teacher: dict[str, Any],
    quality: dict[str, Any],
    error: type[Exception],
    message: str,
    workspace: Path,
    tiny_backbone: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.backbone.loading.load_backbone", None)
    monkeypatch.setattr("pipeline.teach.recipe.load_backbone", None)
    write_inputs(tiny_backbone(), teacher, quality={"texts": 8, **quality})
    write_folder(Path("tasks/broken"), {"default": {"test": [{"sentence1": "a", "sentence2": "b", "score": 1.0}]}})
    Path("tasks/broken/default/test.jsonl").write_text("{")
    with pytest.raises(error, match=message):
        teach()
    assert not list(Path(".work").rglob("mntp-*"))


@pytest.mark.slow
def test_one_model_at_a_time_is_in_memory(
    workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counting(*args: Any, **keys: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        model = load_backbone(*args, **keys)
        loaded.append(weakref.ref(model.get_decoder().embed_tokens.weight))
        return model

    for module in ("teach.recipe", "embed.teachers.backbone", "embed.teachers.llm2vec"):
        monkeypatch.setattr(f"pipeline.{module}.load_backbone", counting)
    for named in ([], ["pairs"]):
        write_inputs(tiny_backbone(), quality={"local": named, "texts": 8})
        teach()
    # The recipe's, then four that are measured; the second time nothing is trained.
    assert alive == [0] * 9


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process sums in the order of a stage that `stage_runs` starts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "resumed"),
    [
        ("checkpoint.committed:3", "mntp: resuming after step 3 of 6"),
        ("checkpoint.commit:9", "simcse: resuming after step 2 of 6"),
    ],
)
def test_kill_9_resumes_to_the_same_bytes(
    point: str,
    resumed: str,
    workspace: Path,
    tiny_backbone: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_thread: None,
) -> None:
    write_inputs(tiny_backbone())
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PIPELINE_WORK_DIR", "elsewhere")
        teach()
    expected = folder_bytes(Path("models/teacher"))
    with monkeypatch.context() as killing:
        killing.setenv(fault_points.VARIABLE, point)
        process = start("teach")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        teach()
    assert resumed in caplog.text
    assert folder_bytes(Path("models/teacher")) == expected


def test_a_teacher_that_is_worse_warns_or_fails_and_leaves_its_record(
    workspace: Path,
    tiny_backbone: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    worse = quality.Quality({"backbone-mean/mean/tasks": 0.5, "simcse/mean/tasks": 0.4}, [], {})
    monkeypatch.setattr(quality, "measure", lambda *_, **__: worse)
    write_inputs(tiny_backbone(), on_worse="fail")
    result = CliRunner().invoke(app, [])
    assert (result.exit_code, Path("models/teacher").exists()) == (1, False)
    assert re.search(r"^error: teach\.on_worse: .* 0\.4000 .* 0\.5000 \(-0\.1000\)", result.stderr, re.MULTILINE)
    facts = json.loads(Path("results/teach.json").read_text())
    assert facts["metrics"] == worse.metrics
    assert facts["worse_than_untrained"].startswith("the trained teacher scores 0.4000")
    assert facts.keys() >= {"seconds", "started", "environment", "mntp", "simcse"}
    write_inputs(tiny_backbone())
    with caplog.at_level(logging.WARNING):
        teach()
    assert "the trained teacher scores 0.4000" in caplog.text
    assert open_artifact(Path("models/teacher"), "teacher").manifest.params["asked"] is True


def test_errors_of_the_teacher_name_the_section_that_has_it(tiny_backbone: Callable[..., Path]) -> None:
    backbone = BackboneParams(name=str(tiny_backbone()), dtype="float32")
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.max_tokens: 513 exceeds"), section("teach"):
        _load(load_backbone_teacher, backbone, max_tokens=513, dtype="float32", batch_tokens=16)
