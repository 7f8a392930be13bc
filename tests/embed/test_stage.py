"""The embed stage as a user runs it: whole, killed, interrupted, and with what it cannot use."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from pipeline.core import fault_points
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.schemas import check_table, responses_schema, targets_schema
from pipeline.core.target_transform import load_transform
from pipeline.core.vectors import anisotropy, matrix
from pipeline.embed.__main__ import app
from pipeline.embed.teachers.stub import HashTeacher
from tests.stage_runs import (
    RESPONSE,
    folder_bytes,
    kept_rows,
    row_id,
    start,
    wait_until,
    write_params,
    write_queries,
    write_responses,
)

TARGETS_DIR = Path("data/targets")
TEXTS = [f"answer number {index}" for index in range(1100)]


@pytest.fixture
def configure(workspace: Path, tiny_backbone: Callable[..., Path]) -> Callable[..., None]:
    """Write params.yaml with a teacher of these keys; `embed` holds the others."""
    backbone = {"name": str(tiny_backbone("llama")), "dtype": "float32"}

    def write(embed: dict[str, Any] | None = None, **teacher: Any) -> None:
        teacher = {"kind": "hash", "batch_tokens": 9} | teacher
        write_params(backbone=backbone, embed={"teacher": teacher, "dtype": "float32"} | (embed or {}))

    return write


Configure = Callable[..., None]


def invoke() -> Result:
    return CliRunner().invoke(app, [])


def facts() -> dict[str, Any]:
    return json.loads(Path("results/embed.json").read_text())


def fails(message: str) -> None:
    result = invoke()
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not TARGETS_DIR.exists()


def test_one_target_a_usable_response(configure: Configure) -> None:
    configure(options={"width": 8})
    failed = {"response": "", "finish_reason": "error", "error": "out of luck"}
    write_responses(
        TEXTS[:30], **{TEXTS[4]: failed, TEXTS[5]: {"response": " "}, TEXTS[6]: {"finish_reason": "length"}}
    )
    assert invoke().exit_code == 0
    artifact = open_artifact(TARGETS_DIR, "targets")
    table = artifact.read()
    check_table(table, targets_schema(8, "float32"), "targets")
    expected = {row_id(text): text for text in TEXTS[:30] if text not in TEXTS[4:6]}
    assert table["id"].to_pylist() == sorted(expected)
    vectors = HashTeacher(width=8).embed([expected[row] for row in sorted(expected)])
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors)
    counts = {"embedded": 28, "truncated_responses": 0, "skipped": {"error": 1, "empty": 1}}
    assert artifact.manifest.counts == facts()["counts"] == counts
    assert artifact.manifest.models["teacher"]["stub"] is True
    assert set(artifact.manifest.inputs) == {"data/responses"}
    norms = np.linalg.norm(vectors, axis=1)
    assert facts()["norm_mean"] == pytest.approx(norms.mean(), abs=1e-4)
    assert facts()["norm_std"] == pytest.approx(norms.std(), abs=1e-4)


def test_a_target_is_the_mean_over_the_samples_of_its_query(configure: Configure) -> None:
    configure(options={"width": 8})
    rows = [
        {"id": row_id(text), "response": text, **RESPONSE, "samples": [f"{text} again", text]} for text in TEXTS[:9]
    ]
    with create(Path("data/responses"), kind="responses", params={"generate": {"samples_per_query": 3}}) as out:
        table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]), schema=responses_schema(3))
        out.write_parts([table], responses_schema(3))
    assert invoke().exit_code == 0
    table = open_artifact(TARGETS_DIR, "targets").read()
    check_table(table, targets_schema(8, "float32"), "targets")
    texts = sorted(TEXTS[:9], key=row_id)
    said, again = (HashTeacher(width=8).embed(given) for given in (texts, [f"{text} again" for text in texts]))
    np.testing.assert_allclose(matrix(table["embedding"]), (2 * said + again) / 3, rtol=1e-5)
    assert facts()["counts"] == {"embedded": 9, "truncated_responses": 0, "skipped": {"error": 0, "empty": 0}}
    assert facts()["computed_rows"] == 18


def test_backbone_as_teacher(configure: Configure) -> None:
    configure(kind="backbone", max_tokens=32, embed={"dtype": "float16", "normalize": True})
    write_responses(TEXTS[:5])
    assert invoke().exit_code == 0
    table = open_artifact(TARGETS_DIR, "targets").read()
    check_table(table, targets_schema(32, "float16"), "targets")
    lengths = np.linalg.norm(np.array(table["embedding"].to_pylist(), np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=2e-3)


def test_live_progress_leaves_the_targets_as_they_are(configure: Configure) -> None:
    configure()
    write_responses(TEXTS[:20])
    assert invoke().exit_code == 0
    plain = folder_bytes(TARGETS_DIR)
    shutil.rmtree(".work")
    configure(embed={"track": "dvclive"})
    assert invoke().exit_code == 0
    assert folder_bytes(TARGETS_DIR) == plain
    live = json.loads(Path("results/live/embed/metrics.json").read_text())
    assert (live["rows"], live["progress"], live["step"]) == (20, 1.0, 20)
    assert live["tokens_per_second"] > 0


def test_changed_responses_compute_only_new_rows(configure: Configure) -> None:
    configure()
    write_responses(TEXTS[:20])
    invoke()
    write_responses(TEXTS[:25])
    invoke()
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (5, 20)


def test_a_changed_answer_to_the_same_query_is_embedded_anew(configure: Configure) -> None:
    configure(options={"width": 4})
    write_responses(TEXTS[:20])
    invoke()
    write_responses(TEXTS[:20], **{TEXTS[3]: {"response": "on second thought, no"}})
    invoke()
    assert facts()["computed_rows"] == 1
    table = open_artifact(TARGETS_DIR, "targets").read()
    found = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))[row_id(TEXTS[3])]
    assert found == HashTeacher(width=4).embed(["on second thought, no"])[0].tolist()


def targets(texts: list[str] = TEXTS[:200]) -> np.ndarray[Any, Any]:
    """Of these texts, in their order."""
    table = open_artifact(TARGETS_DIR, "targets").read()
    found = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    return np.array([found[row_id(text)] for text in texts if row_id(text) in found], np.float32)


def whiten(**keys: Any) -> dict[str, Any]:
    return {"transform": {"kind": "whiten", "shrinkage": 0.0, **keys}}


def test_a_transform_is_fitted_on_the_training_rows_and_stored(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    write_responses(TEXTS[:200])
    configure(options={"width": 6})
    assert invoke().exit_code == 0
    raw = targets()
    assert facts()["transform"] == {"kind": "none"}
    configure(options={"width": 6}, embed=whiten())
    result = invoke()
    assert result.exit_code == 0, result.output
    assert facts()["computed_rows"] == 0
    trained_on = [text for index, text in enumerate(TEXTS[:200]) if index % 10]
    np.testing.assert_allclose(np.cov(targets(trained_on).T, bias=True), np.eye(6), atol=1e-4)
    assert abs(np.cov(targets().T, bias=True) - np.eye(6)).max() > 1e-3
    artifact = open_artifact(TARGETS_DIR, "targets")
    transform = load_transform(TARGETS_DIR)
    assert transform is not None
    assert set(artifact.manifest.files) == {"part-00000.parquet", "transform.safetensors"}
    assert artifact.manifest.params["transform"]["kind"] == "whiten"
    assert set(artifact.manifest.inputs) == {"data/responses", "data/queries"}
    np.testing.assert_allclose(transform.invert(targets()), raw, atol=1e-5)
    assert facts()["transform"]["fitted_rows"] == 180
    assert facts()["anisotropy"] == pytest.approx(anisotropy(targets()), abs=1e-5)
    assert facts()["transform"]["anisotropy_before"] == pytest.approx(
        anisotropy(raw[[i for i in range(200) if i % 10]]), abs=1e-5
    )


def test_an_automatic_transform_leaves_targets_that_point_everywhere(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    write_responses(TEXTS[:200])
    configure(options={"width": 6})
    assert invoke().exit_code == 0
    raw = targets()
    configure(options={"width": 6}, embed={"transform": {"kind": "auto"}})
    result = invoke()
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(targets(), raw)
    assert set(open_artifact(TARGETS_DIR, "targets").manifest.files) == {"part-00000.parquet"}
    found = facts()["transform"]
    assert found["kind"] == "none"
    assert abs(found["anisotropy_before"]) < 0.1


def test_heldout_rows_never_influence_the_fit(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    configure(options={"width": 6}, embed=whiten())
    write_responses(TEXTS[:200])
    invoke()
    before = (TARGETS_DIR / "transform.safetensors").read_bytes()
    write_responses(TEXTS[:200], **{text: {"response": f"quite another {text}"} for text in TEXTS[:200:10]})
    invoke()
    assert facts()["computed_rows"] == 20
    assert (TARGETS_DIR / "transform.safetensors").read_bytes() == before
    write_responses(TEXTS[:200], **{TEXTS[1]: {"response": "quite another"}})
    invoke()
    assert (TARGETS_DIR / "transform.safetensors").read_bytes() != before


def test_a_transform_is_the_same_however_the_store_is_cut_into_shards(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    configure(options={"width": 6}, embed=whiten(components=3))
    write_responses(TEXTS[:200])
    invoke()
    at_once = folder_bytes(TARGETS_DIR)
    shutil.rmtree(".work")
    for count in (50, 51, 130):
        write_responses(TEXTS[200 - count : 200])
        invoke()
    write_responses(TEXTS[:200])
    invoke()
    assert folder_bytes(TARGETS_DIR) == at_once
    assert targets().shape == (200, 3)


def test_a_transform_without_queries(configure: Configure) -> None:
    configure(embed=whiten())
    write_responses(TEXTS[:20])
    fails("data/queries is not a finished artifact")
    write_queries(TEXTS[30:60])
    fails("embed.transform.kind: whiten is fitted on training responses, at least 2: there are 0")
    configure(embed={"transform": {"kind": "auto"}})
    fails("embed.transform.kind: auto is fitted on training responses, at least 2: there are 0")


@pytest.mark.parametrize(
    ("point", "delay", "fewest", "most"),
    [
        ("row_store.commit:1", 0.0, 0, 0),
        ("row_store.committed:1", 0.006, 1, len(TEXTS) - 1),  # a shard is written every two seconds
        ("artifact.commit:1", 0.0, len(TEXTS), len(TEXTS)),
    ],
)
def test_kill_9_then_run_again(
    point: str, delay: float, fewest: int, most: int, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_responses(TEXTS)
    configure()
    monkeypatch.setenv("PIPELINE_WORK_DIR", "elsewhere")
    invoke()
    uninterrupted = folder_bytes(TARGETS_DIR)
    shutil.rmtree(TARGETS_DIR)
    monkeypatch.delenv("PIPELINE_WORK_DIR")

    configure(options={"delay": delay})
    with monkeypatch.context() as killing:
        killing.setenv(fault_points.VARIABLE, point)
        process = start("embed")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    kept = kept_rows("embed")
    assert fewest <= kept <= most
    assert not TARGETS_DIR.exists()

    configure()
    invoke()
    assert folder_bytes(TARGETS_DIR) == uninterrupted
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (len(TEXTS) - kept, kept)


@pytest.mark.slow
def test_ctrl_c_keeps_every_finished_row(configure: Configure) -> None:
    write_responses(TEXTS)
    configure(options={"delay": 0.02})  # ten seconds in all: the signal must come before the end
    process = start("embed")
    wait_until(lambda: kept_rows("embed") > 100, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted: finished work is kept, run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not TARGETS_DIR.exists()
    kept = kept_rows("embed")
    assert 100 < kept < len(TEXTS)
    configure()
    invoke()
    assert facts()["reused_rows"] == kept


def test_missing_responses(configure: Configure) -> None:
    configure()
    fails("data/responses is not a finished artifact")


def test_no_usable_response(configure: Configure) -> None:
    configure()
    write_responses(TEXTS[:2], **{text: {"response": ""} for text in TEXTS[:2]})
    fails("data/responses holds no usable response to embed: {'error': 0, 'empty': 2}")


def test_a_teacher_that_is_not_there(configure: Configure) -> None:
    configure(kind="sentence-transformers", name="./nowhere")
    write_responses(TEXTS[:2])
    fails("embed.teacher.name: model folder ./nowhere does not exist")


def test_unknown_key(configure: Configure) -> None:
    configure(nane="x")
    fails("embed.teacher.nane: unknown key (did you mean 'name'?)")


# --- gates ----------------------------------------------------------------------------------------------------------


class FlawedTeacher(HashTeacher):
    """A vector of zeros for answers that begin with z, a long one for those with l, one and the same for s."""

    def _vector(self, text: str) -> np.ndarray:
        vector = super()._vector("same" if text.startswith("s") else text)
        return vector * np.float32({"z": 0.0, "l": 1000.0}.get(text[0], 1.0))


@pytest.mark.parametrize(
    ("letter", "count", "message", "gate"),
    [
        ("z", 2, "embed.gates.zero: 0.1 of the targets have length 0", {"zero": 0.1}),
        ("l", 2, "embed.gates.odd_length: 0.1 of the targets are over 10 times longer", {}),
        ("s", 12, "embed.gates.equal: 0.55 of the targets repeat", {"equal": 0.55}),
        ("s", 20, "gates.cosine: 1 is the mean cosine of two targets", {"equal": 1.0, "cosine": 1.0}),
    ],
)
def test_a_gate_that_fails_publishes_nothing_and_keeps_the_vectors(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, letter: str, count: int, message: str, gate: dict[str, float]
) -> None:
    monkeypatch.setattr("pipeline.embed.teachers.stub.HashTeacher", FlawedTeacher)
    write_responses([f"{letter if index < count else 'a'} {index}" for index in range(20)])
    configure()
    fails(message)
    # A vector of zeros is also over ten times shorter than the median.
    configure(embed={"gates": {"odd_length": 0.1, **gate}})
    assert invoke().exit_code == 0
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (0, 20)


def test_the_first_thousand_vectors_warn_before_the_end(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.embed.teachers.stub.HashTeacher", FlawedTeacher)
    write_responses([f"s {index}" for index in range(1100)])
    configure(batch_tokens=32)
    fails("embed.gates.equal")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in warnings if "repeat another row's" in line and "gates.equal" in line]) == 1


# --- the queries' own embeddings ------------------------------------------------------------------------------------

QUERIES = {"queries": True}


def query_targets() -> np.ndarray[Any, Any]:
    """Of `TEXTS[:200]`, in their order."""
    table = open_artifact(TARGETS_DIR, "targets").read()
    found = dict(zip(table["id"].to_pylist(), table["query_embedding"].to_pylist(), strict=True))
    return np.array([found[row_id(text)] for text in TEXTS[:200] if row_id(text) in found], np.float32)


def write_answers(count: int) -> None:
    """Answers in capitals, and three that are none: a failed one, a blank one, and one that repeats its query."""
    answers: dict[str, dict[str, Any]] = {text: {"response": text.upper()} for text in TEXTS[:count]}
    answers[TEXTS[4]] = {"response": "", "finish_reason": "error", "error": "out of luck"}
    answers |= {TEXTS[5]: {"response": " "}, TEXTS[6]: {"response": TEXTS[6]}}
    write_responses(TEXTS[:count], **answers)


def test_the_teacher_embeds_the_queries_too(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    write_answers(200)
    configure(options={"width": 6}, embed=QUERIES)
    result = invoke()
    assert result.exit_code == 0, result.output
    artifact, usable = open_artifact(TARGETS_DIR, "targets"), [text for text in TEXTS[:200] if text not in TEXTS[4:6]]
    check_table(artifact.read(), targets_schema(6, "float32", queries=True), "targets")
    teacher = HashTeacher(width=6)
    np.testing.assert_array_equal(query_targets(), teacher.embed(usable))
    answers = [text if text == TEXTS[6] else text.upper() for text in usable]
    np.testing.assert_array_equal(targets(usable), teacher.embed(answers))
    assert (artifact.manifest.rows, artifact.manifest.params["queries"]) == (198, True)
    counts = {"embedded": 198, "truncated_responses": 0, "truncated_queries": 0, "skipped": {"error": 1, "empty": 1}}
    assert artifact.manifest.counts == counts
    assert set(artifact.manifest.inputs) == {"data/responses", "data/queries"}
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (2 * 198 - 1, 1)  # one query is its own answer

    configure(options={"width": 6})
    assert invoke().exit_code == 0
    assert open_artifact(TARGETS_DIR, "targets").read().column_names == ["id", "embedding"]
    assert "queries" not in open_artifact(TARGETS_DIR, "targets").manifest.params
    assert facts()["computed_rows"] == 0


def test_the_transform_of_the_responses_maps_the_queries_too(configure: Configure) -> None:
    write_queries(TEXTS[:200])
    write_answers(200)
    configure(options={"width": 6}, embed={**QUERIES, **whiten(components=3)})
    assert invoke().exit_code == 0
    transform = load_transform(TARGETS_DIR)
    assert transform is not None
    raw = HashTeacher(width=6).embed([text for text in TEXTS[:200] if text not in TEXTS[4:6]])
    np.testing.assert_allclose(query_targets(), transform(raw), atol=1e-6)


@pytest.mark.parametrize("point", ["row_store.committed:1", "artifact.commit:1"])
def test_a_killed_run_resumes_with_the_queries(
    point: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_queries(TEXTS)
    write_answers(len(TEXTS))
    configure(embed=QUERIES)
    monkeypatch.setenv("PIPELINE_WORK_DIR", "elsewhere")
    assert invoke().exit_code == 0
    uninterrupted = folder_bytes(TARGETS_DIR)
    shutil.rmtree(TARGETS_DIR)
    monkeypatch.delenv("PIPELINE_WORK_DIR")
    with monkeypatch.context() as killing:
        killing.setenv(fault_points.VARIABLE, point)
        process = start("embed")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    kept, every = kept_rows("embed"), 2 * (len(TEXTS) - 2) - 1
    assert kept == every if point.startswith("artifact") else 0 < kept < every
    invoke()
    assert folder_bytes(TARGETS_DIR) == uninterrupted
    assert facts()["computed_rows"] == every - kept


def test_an_answer_to_no_query_is_named(configure: Configure) -> None:
    write_queries(TEXTS[1:30])
    write_answers(30)
    configure(embed=QUERIES)
    fails(f"embed.queries: {row_id(TEXTS[0])} has a response and is no query")
