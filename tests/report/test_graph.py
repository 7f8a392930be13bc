"""Each stage's state is what the manifests on disk and the audit say."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.audit.findings import Finding
from pipeline.report.graph import Node, State, pipeline_graph
from pipeline.report.render import render_html, render_markdown
from pipeline.report.sections import audit_workspace
from tests.report.toy_results import content_of
from tests.toy_workspace import flip_byte, make_workspace, write_manifest


@pytest.fixture
def toy(workspace: Path) -> Path:
    make_workspace(Path())
    return Path()


def nodes(findings: Sequence[Finding] | None = None, stubs: Sequence[str] = ()) -> dict[str, Node]:
    levels = pipeline_graph(Path(), ["demo"], ["interpret"], stubs=stubs, findings=findings)
    return {node.stage: node for level in levels for node in level}


def states(findings: Sequence[Finding] | None = None, stubs: Sequence[str] = ()) -> list[str]:
    return [str(node.state) for node in nodes(findings, stubs).values()]


def change(name: str) -> None:
    """Another manifest with the same content, as a rerun with other params would write it."""
    path = Path(name) / "manifest.json"
    content = json.loads(path.read_text())
    write_manifest(path, {**content, "params": {"changed": True}})


def test_stages_stand_in_the_order_of_the_pipeline(toy: Path) -> None:
    levels = pipeline_graph(Path(), ["demo"], ["interpret"], stubs=(), findings=None)
    assert [[node.stage for node in level] for level in levels] == [
        ["collect"], ["generate"], ["embed"], ["train"], ["evaluate demo", "probe interpret"],
    ]  # fmt: skip
    assert all(len(node.digest) == 64 for level in levels for node in level)


def test_an_audit_tells_made_from_verified(toy: Path) -> None:
    assert set(states()) == {State.MADE}
    assert set(states(audit_workspace(toy, []).findings)) == {State.VERIFIED}


def test_what_follows_a_changed_artifact_is_out_of_date(toy: Path) -> None:
    change("data/responses")
    found = nodes()
    assert [str(node.state) for node in found.values()] == ["made", "made"] + ["out of date"] * 4
    assert found["embed"].reasons == ["data/responses was made anew since"]
    assert found["train"].reasons == ["data/responses was made anew since", "data/targets is out of date"]
    assert found["evaluate demo"].reasons == ["models/encoder is out of date"]
    # Staleness is the audit's finding too, and no damage.
    findings = audit_workspace(Path(), []).findings
    assert all(finding.stale for finding in findings)
    assert states(findings)[2:] == ["out of date"] * 4


def test_a_flipped_byte_fails_its_stage_alone(toy: Path) -> None:
    flip_byte(Path("models/encoder/student.safetensors"), -1)
    found = nodes(audit_workspace(toy, []).findings)
    assert [stage for stage, node in found.items() if node.state == State.FAILED] == ["train"]
    assert found["train"].reasons[0].startswith("student.safetensors sha256 is")


def test_a_damaged_manifest_fails_and_a_missing_one_is_missing(toy: Path) -> None:
    Path("data/targets/manifest.json").write_text("{")
    shutil.rmtree("results/probe/interpret")
    found = nodes()
    assert (found["embed"].state, found["probe interpret"].state) == (State.FAILED, State.MISSING)
    assert "is damaged" in found["embed"].reasons[0]


def test_an_out_that_differs_from_the_lock_fails_its_stage(toy: Path) -> None:
    found = nodes([Finding("dvc.lock", "data/queries", "md5 is x, stage collect made y")])
    assert [stage for stage, node in found.items() if node.state == State.FAILED] == ["collect"]


def test_stubs_show_unless_something_is_worse(toy: Path) -> None:
    assert states(stubs=["data/responses", "evaluate demo"])[1::3] == ["stub", "stub"]
    change("data/queries")
    node = nodes(stubs=["data/responses"])["generate"]
    assert (node.state, node.reasons[-1]) == (State.OUT_OF_DATE, "made by a stub")


def test_both_pages_show_state_reason_and_hash(made: Path) -> None:
    change("data/responses")
    content = content_of()
    digest = content.graph[1][0].digest
    html, markdown = render_html(content), render_markdown(content)
    assert f'<code title="{digest}">{digest[:12]}</code>' in html
    assert "↻</span> out of date" in html
    assert "| embed | ↻ out of date | data/targets | 3 |" in markdown
    for page in (html, markdown):
        assert "data/responses was made anew since" in page
        assert digest in page
