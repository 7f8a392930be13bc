"""A trained teacher among a workspace's artifacts: audit, inspect, and the plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from pipeline.audit import audit
from pipeline.audit.inspect import show
from pipeline.backbone.loading import identify
from pipeline.cli.plan import AllParams, make_plan
from pipeline.core.artifacts import create, read_manifest
from pipeline.core.config import read_yaml, validate
from pipeline.core.errors import EvaluationError
from tests.conftest import ROOT
from tests.toy_workspace import TEACHER, edit_manifest, flip_byte, make_workspace, restamp


def write_teacher(value: float = 1.0) -> None:
    inputs = [read_manifest(Path("data/queries")), read_manifest(Path("data/responses"))]
    with create(Path("models/teacher"), kind="teacher", params={"asked": True}, inputs=inputs) as out:
        for phase in ("mntp", "simcse"):
            (out.path / phase).mkdir()
            (out.path / phase / "adapter_config.json").write_text("{}")
            save_file({"a": np.full((2, 2), value, np.float32)}, out.path / phase / "adapter_model.safetensors")


@pytest.fixture
def trained(workspace: Path) -> Path:
    """A toy workspace whose targets were made by a teacher that was trained in it."""
    make_workspace(workspace)
    write_teacher()
    adapters = [identify(f"models/teacher/{phase}", None) for phase in ("mntp", "simcse")]
    for name in ("data/targets", "models/encoder"):
        edit_manifest(Path(), name, models={"teacher": {**TEACHER, "adapters": adapters}})
    restamp(Path(), "models/teacher")
    return workspace


def lines() -> list[str]:
    return [finding.line() for finding in audit().findings]


def test_an_intact_one_gives_no_finding(trained: Path) -> None:
    report = audit()
    assert not report.findings
    assert "models/teacher" in {item.artifact for item in report.verified}


def test_targets_of_other_adapters_than_are_there_now(trained: Path) -> None:
    write_teacher(2.0)
    assert any("was made by another models/teacher/simcse than is there now: its sha256 is" in line for line in lines())
    Path("models/teacher").rename("models/away")
    assert any("models/teacher/mntp than is there now: it is missing" in line for line in lines())


def test_a_flipped_byte_and_a_stale_teacher(trained: Path) -> None:
    flip_byte(Path("models/teacher/mntp/adapter_model.safetensors"), -1)
    assert any(line.startswith("models/teacher") and "sha256 is" in line for line in lines())
    write_teacher()
    edit_manifest(Path(), "data/queries", params={"seed": 1})
    assert any(line.startswith("models/teacher") and "is stale: made from data/queries" in line for line in lines())


def test_its_tensors_are_shown(trained: Path) -> None:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(show("teach", 5))
    assert "mntp/adapter_model.safetensors" in shown.get()


def plan_with(**changes: Any) -> Any:
    content = read_yaml(ROOT / "params.demo.yaml")
    content["embed"]["teacher"] = {"kind": "llm2vec-trained", "max_tokens": 256}
    content["train"]["response_form"] = "beside"
    content["teach"] |= changes
    return make_plan(validate(content, AllParams, where="params"), ROOT)


def test_the_plan_says_what_is_trained_on_what() -> None:
    (line,) = [line for line in plan_with().lines if line[0] == "teach"]
    assert line[1] == (
        "MNTP 60 steps of 8 texts, at most 64 tokens; SimCSE 40 steps of 32 texts, at most 32 tokens; from both; "
        "measured on sts, retrieval"
    )
    assert line[2].startswith("models/SmolLM2-135M-Instruct, float32")
    source = {"kind": "hub", "name": "org/texts", "column": "text"}
    remarks = plan_with(corpus="sources", sources=[source]).remarks
    assert "teach.sources.0.revision: org/texts is not pinned: set the commit" in remarks


def test_the_plan_estimates_memory_and_knows_the_names_of_tasks() -> None:
    content = read_yaml(ROOT / "params.yaml")
    content["embed"]["teacher"] = {"kind": "llm2vec-trained"}
    (line,) = [
        line for line in make_plan(validate(content, AllParams, where="params"), ROOT).lines if line[0] == "teach"
    ]
    assert line[2] == "Qwen/Qwen3-4B, bfloat16, at most MNTP 48.5 GB, SimCSE 50.9 GB"
    with pytest.raises(EvaluationError, match=r"teach\.quality: mteb has no task 'SciFactt'"):
        plan_with(quality={"tasks": ["SciFactt"]})


def test_sources_go_with_the_corpus_that_reads_them() -> None:
    with pytest.raises(Exception, match="corpus sources with 0 sources: they go together"):
        plan_with(corpus="sources")


def test_a_teacher_learns_from_bare_texts() -> None:
    source = {"kind": "local", "path": "a.txt", "instruction": "Summarize:"}
    with pytest.raises(Exception, match=r"teach: .*sources\.0\.instruction: a teacher learns from bare texts"):
        plan_with(corpus="sources", sources=[source])
