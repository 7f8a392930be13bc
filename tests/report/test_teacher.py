"""What the pages say of the teacher."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.artifacts import create
from pipeline.core.files import write_json
from pipeline.report.render import render_html, render_markdown
from pipeline.report.sections import teacher_facts
from tests.report.toy_results import RECORD, content_of
from tests.toy_workspace import write_manifest

ADAPTERS = [{"name": f"models/teacher/{phase}", "sha256": "0" * 64} for phase in ("mntp", "simcse")]
QUALITY = {
    "backbone-mean/sts": 0.51, "mntp/sts": 0.2, "simcse/sts": 0.3, "simcse/type/STS": 0.3, "simcse/mean/types": 0.3,
    "backbone-mean/mean/tasks": 0.51, "mntp/mean/tasks": 0.2, "simcse/mean/tasks": 0.3,
}  # fmt: skip


def of_targets(identity: dict[str, Any], **params: Any) -> None:
    """Change what the manifest of the targets says."""
    path = Path("data/targets/manifest.json")
    content = json.loads(path.read_text())
    write_manifest(path, {**content, "models": {"teacher": identity}, "params": params})


def train_a_teacher(worse: str | None) -> None:
    of_targets({"kind": "llm2vec", "name": "b", "adapters": ADAPTERS}, transform={"kind": "whiten"})
    with create(Path("models/teacher"), kind="teacher", params={"asked": True}):
        pass
    facts = {"metrics": QUALITY, "worse_than_untrained": worse, "corpus": {"kind": "both"}}
    write_json(Path("results/teach.json"), {**facts, **RECORD})


@pytest.mark.parametrize(
    ("identity", "kind"),
    [
        ({"kind": "llm2vec", "adapters": [{"name": "McGill-NLP/x-mntp"}]}, "llm2vec"),
        ({"kind": "llm2vec", "adapters": ADAPTERS}, "llm2vec-trained"),
        ({"kind": "backbone", "name": "b"}, "backbone"),
        ({"kind": "sentence-transformers", "name": "m"}, "sentence-transformers"),
    ],
)
def test_a_teacher_is_told_by_its_identity(made: Path, identity: dict[str, Any], kind: str) -> None:
    of_targets(identity)
    found = teacher_facts(made, {"metrics": QUALITY})
    assert found is not None
    assert found.kind == kind
    assert found.meaning
    assert found.transform == "none"
    assert bool(found.scores) == (kind == "llm2vec-trained")  # another's record is an old one


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        ({"kind": "auto"}, "none"),  # nothing was to be changed: there is no file of a transform
        ({"kind": "standardize", "decorrelate": 0.5, "rotate": True}, "standardize, decorrelated, rotated"),
    ],
)
def test_what_was_done_to_its_vectors(made: Path, transform: dict[str, Any], said: str) -> None:
    of_targets({"kind": "backbone", "name": "b"}, transform=transform)
    found = teacher_facts(made, None)
    assert found is not None and found.transform == said


@pytest.mark.parametrize(("corpus", "said"), [("sources", "teach.sources"), ("queries", "this run's own (queries)")])
def test_whose_text_it_was_trained_on(made: Path, corpus: str, said: str) -> None:
    of_targets({"kind": "llm2vec", "adapters": ADAPTERS})
    found = teacher_facts(made, {"corpus": {"kind": corpus}})
    assert found is not None
    assert found.meaning.endswith(f"its text is {said}")


def test_no_targets_nothing_said(workspace: Path) -> None:
    assert teacher_facts(workspace, None) is None


def test_a_teacher_trained_here_is_a_stage_with_scores(made: Path) -> None:
    train_a_teacher("it scores below mean pooling")
    content = content_of()
    assert [level[0].stage for level in content.graph][:4] == ["collect", "generate", "teach", "embed"]
    assert content.teacher is not None
    assert content.teacher.scores == {
        "sts": {"backbone-mean": 0.51, "mntp": 0.2, "simcse": 0.3},
        "mean/tasks": {"backbone-mean": 0.51, "mntp": 0.2, "simcse": 0.3},
    }
    assert not content.missing
    for page in (render_html(content), render_markdown(content)):
        for text in ("from unlabeled text", "its text is this run", "it scores below mean pooling", "whiten", "0.510"):
            assert text in page


def test_one_that_was_not_asked_for_is_no_stage(made: Path) -> None:
    with create(Path("models/teacher"), kind="teacher", params={"asked": False}):
        pass
    assert "teach" not in [node.stage for level in content_of().graph for node in level]
