"""The audit names each fault by artifact and row, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.audit import audit
from pipeline.audit.findings import SHOWN_PER_CHECK, Finding, Findings
from pipeline.audit.lock import dvc_md5
from pipeline.backbone.loading import identify
from pipeline.core.artifacts import read_manifest
from pipeline.core.files import file_sha256
from pipeline.core.schemas import SAMPLES
from pipeline.core.target_transform import TRANSFORM_FILE, TargetTransform
from tests.toy_workspace import (
    EMPTY,
    FAILED,
    IDS,
    TEXTS,
    USABLE,
    edit_manifest,
    flip_byte,
    make_workspace,
    rewrite,
    write_encoder,
    write_result,
    write_targets,
)

PART0 = "part-00000.parquet"


@pytest.fixture
def made(workspace: Path) -> Path:
    make_workspace(Path())
    return Path()


def lines(root: Path = Path()) -> list[str]:
    return [finding.line() for finding in audit(root).findings]


def set_cell(column: str, row: int, value: Any):
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[row][column] = value
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


def drop(row_id: str):
    return lambda table: table.filter(pa.compute.not_equal(table["id"], row_id))


def test_a_sound_workspace_has_no_findings_and_is_summed_up(made: Path) -> None:
    report = audit(made)
    assert report.findings == []
    rows = {item.artifact: (item.rows, item.files) for item in report.verified}
    assert rows == {
        "data/queries": (5, 2),
        "data/responses": (5, 3),
        "data/targets": (3, 2),
        "models/encoder": (0, 2),
        "results/evaluate/demo": (0, 1),
        "results/probe/interpret": (0, 1),
    }
    assert {item.artifact: item.note for item in report.verified}["data/responses"] == "empty 1, failed 1"
    assert report.locked is None


def test_an_empty_workspace_is_not_made_yet(workspace: Path) -> None:
    report = audit(workspace)
    assert report.findings == []
    assert report.not_made == ["data/queries", "data/responses", "data/targets", "models/encoder"]


def test_a_later_stage_that_did_not_run_is_no_finding(made: Path) -> None:
    for name in ("models/encoder", "results"):
        shutil.rmtree(name)
    assert audit(made).findings == []
    assert audit(made).not_made == ["models/encoder"]


def test_a_missing_artifact_with_something_downstream_is_a_finding(made: Path) -> None:
    shutil.rmtree("data/targets")
    assert lines() == ["data/targets: missing, though models/encoder was made after it"]


@pytest.mark.parametrize(
    "file", ["data/queries/train.parquet", f"data/targets/{PART0}", "models/encoder/student.safetensors"]
)
@pytest.mark.parametrize("at", [0, 100, -1])
def test_one_flipped_byte_gives_the_one_line_that_names_its_file(made: Path, file: str, at: int) -> None:
    before = file_sha256(Path(file))
    flip_byte(Path(file), at)
    artifact, _, name = file.rpartition("/")
    after = file_sha256(Path(file))
    assert lines() == [f"{artifact} {name}: sha256 is {after[:12]}..., the manifest says {before[:12]}..."]


def test_a_missing_and_a_foreign_file(made: Path) -> None:
    Path("data/queries/heldout.parquet").unlink()
    Path("models/encoder/extra.txt").write_text("x")
    assert lines() == [
        "data/queries heldout.parquet: missing, though the manifest lists it",
        "models/encoder extra.txt: not in the manifest",
    ]


def test_a_manifest_of_another_format_or_kind(made: Path) -> None:
    edit_manifest(made, "results/evaluate/demo", format_version=99)
    edit_manifest(made, "data/targets", kind="queries")
    found = lines()
    assert found[0] == "data/targets manifest.json: holds 'queries', expected 'targets'"
    assert found[1].startswith(
        "results/evaluate/demo manifest.json: results/evaluate/demo/manifest.json: format version 99"
    )
    assert len(found) == 2


def test_a_query_without_response(made: Path) -> None:
    lost = sorted(IDS.values())[0]
    rewrite(made, "data/responses", PART0, drop(lost), rows=4)
    expected = [f"data/responses {lost}: this query has no response row"]
    if lost in USABLE:
        expected.append(f"data/targets {lost}: no usable response has this id")
    assert lines() == expected


def test_a_usable_response_without_target(made: Path) -> None:
    rewrite(made, "data/targets", PART0, drop(USABLE[0]), rows=2)
    assert lines() == [f"data/targets {USABLE[0]}: this usable response has no target"]


def test_samples_belong_to_responses_that_say_so(made: Path) -> None:
    """Five rows, two a part, with two samples each beside the answer."""
    more = {"params": {"generate": {"samples_per_query": 3}}}
    for part in range(3):
        rewrite(made, "data/responses", f"part-{part:05d}.parquet", with_samples(2))
    assert any("schema is" in line for line in lines())
    edit_manifest(made, "data/responses", **more)
    assert not [line for line in lines() if "schema is" in line or "answers" in line]
    rewrite(made, "data/responses", PART0, lambda table: with_samples(3)(table.drop_columns(["samples"])))
    first, second = sorted(IDS.values())[:2]
    assert [line for line in lines() if "answers" in line] == [
        f"data/responses {row}: has more than 3 answers" for row in (first, second)
    ]


def with_samples(count: int):
    return lambda table: table.append_column(SAMPLES, pa.array([["x"] * count] * table.num_rows, SAMPLES.type))


def test_failed_and_blank_responses_must_not_have_a_target(made: Path) -> None:
    for text in (FAILED, EMPTY):
        assert IDS[text] not in USABLE
    rewrite(made, "data/targets", "part-00001.parquet", set_cell("id", 0, "f" * 64))
    assert lines() == [
        f"data/targets {USABLE[2]}: this usable response has no target",
        f"data/targets {'f' * 64}: no usable response has this id",
    ]


def test_swapped_ids_are_out_of_order(made: Path) -> None:
    first, second = sorted(IDS.values())[:2]
    rewrite(made, "data/responses", PART0, lambda table: table.take([1, 0]))
    assert lines() == [f"data/responses {first}: comes after {second}: not sorted"]


def test_an_id_that_occurs_in_two_parts(made: Path) -> None:
    rewrite(made, "data/targets", "part-00001.parquet", set_cell("id", 0, USABLE[1]))
    assert lines() == [
        f"data/targets {USABLE[1]}: occurs twice",
        f"data/targets {USABLE[2]}: this usable response has no target",
    ]


def test_row_counts_of_the_manifest(made: Path) -> None:
    edit_manifest(made, "data/queries", rows=6)
    assert lines() == ["data/queries: holds 5 rows, the manifest says 6"]


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("finish_reason", "abort", "finish_reason is not one of stop, length, error"),
        ("prompt_tokens", -1, "prompt_tokens is negative"),
        ("response_tokens", -2, "response_tokens is negative"),
    ],
)
def test_bad_values_in_responses(made: Path, column: str, value: Any, what: str) -> None:
    rewrite(made, "data/responses", PART0, set_cell(column, 0, value))
    assert f"data/responses {sorted(IDS.values())[0]}: {what}" in lines()


def test_a_failed_row_must_say_why(made: Path) -> None:
    position = sorted(IDS.values()).index(IDS[FAILED])
    rewrite(made, "data/responses", f"part-{position // 2:05d}.parquet", set_cell("error", position % 2, None))
    assert lines() == [f"data/responses {IDS[FAILED]}: finish_reason is error without a reason in column 'error'"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_must_be_finite(made: Path, value: float) -> None:
    rewrite(made, "data/targets", PART0, set_cell("embedding", 1, [0.0, value, 0.0]))
    assert lines() == [f"data/targets {USABLE[1]}: embedding holds NaN or infinite values"]


def test_targets_of_two_widths(made: Path) -> None:
    kind = pa.list_(pa.field("item", pa.float32(), nullable=False), 2)
    field = pa.field("embedding", kind, nullable=False)
    rewrite(
        made,
        "data/targets",
        "part-00001.parquet",
        lambda table: table.set_column(1, field, pa.array([[0.0, 1.0]], kind)),
    )
    (line,) = lines()
    assert line.startswith("data/targets part-00001.parquet: schema is (id: string, embedding: fixed_size_list")


def test_a_column_of_another_type(made: Path) -> None:
    rewrite(made, "data/queries", "train.parquet", lambda table: table.drop_columns(["source"]))
    assert lines() == [
        "data/queries train.parquet: schema is (id: string, text: string), must be "
        "(id: string, text: string, source: string)"
    ]


def test_tensors_must_be_finite(made: Path) -> None:
    from safetensors.numpy import save_file

    path = Path("models/encoder/student.safetensors")
    save_file({"tokens": np.array([1.0, np.nan], dtype=np.float32)}, path)
    edit_manifest(made, "models/encoder", files={path.name: file_sha256(path)})
    assert lines() == ["models/encoder student.safetensors: tensor 'tokens' holds NaN or infinite values"]


def test_tensors_must_be_readable(made: Path) -> None:
    path = Path("models/encoder/student.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    edit_manifest(made, "models/encoder", files={path.name: file_sha256(path)})
    (line,) = lines()
    assert line.startswith("models/encoder student.safetensors: is not readable")


def with_queries(made: Path) -> str:
    """Targets of the queries beside those of the responses; their first file."""
    write_targets(made, queries=True)
    edit_manifest(made, "data/targets")
    assert lines() == []
    return f"data/targets/{PART0}"


def test_a_changed_target_of_a_query_is_found(made: Path) -> None:
    file = Path(with_queries(made))
    content = file.read_bytes()
    flip_byte(file, len(content) // 2)
    (line,) = lines()
    assert line.startswith(f"data/targets {PART0}: sha256 is ")
    file.write_bytes(content)
    rewrite(made, "data/targets", PART0, set_cell("query_embedding", 1, [0.0, float("nan"), 0.0]))
    assert lines() == [f"data/targets {USABLE[1]}: query_embedding holds NaN or infinite values"]


@pytest.mark.parametrize("asked", [True, False])
def test_targets_of_queries_are_there_if_the_params_say_so(made: Path, asked: bool) -> None:
    write_targets(made, queries=not asked)
    edit_manifest(made, "data/targets", params={"queries": asked})
    found = lines()
    assert found and all("data/targets" in line and "query_embedding" in line for line in found)


def test_a_text_that_is_not_the_one_of_its_id(made: Path) -> None:
    rewrite(made, "data/queries", "train.parquet", set_cell("text", 0, "another text"))
    first = min(IDS[text] for text in TEXTS["train"])
    assert lines() == [f"data/queries {first}: is not the id of its text"]


def test_an_encoder_of_another_width_than_the_targets(made: Path) -> None:
    path = Path("models/encoder/encoder_config.json")
    path.write_text('{"width": 5}')
    edit_manifest(made, "models/encoder", files={path.name: file_sha256(path)})
    assert lines() == ["models/encoder encoder_config.json: width is 5, the targets have 3"]


@pytest.mark.parametrize(
    ("stated", "params", "said"),
    [
        (0.3, {"train": {"response_share": 0.5}}, "response_share is 0.3, the params of the manifest say 0.5"),
        (0.3, {"train": {"response_share": 0.3}}, "is missing, which response_share 0.3 needs"),
        (1.0, {}, None),
    ],
)
def test_a_response_share_is_that_of_the_params_and_has_a_reading(
    made: Path, stated: float, params: dict[str, Any], said: str | None
) -> None:
    path = Path("models/encoder/encoder_config.json")
    path.write_text(json.dumps({"width": 3, "response_share": stated}))
    edit_manifest(made, "models/encoder", files={path.name: file_sha256(path)}, params=params)
    found = [line for line in lines() if "response_share" in line]
    assert bool(found) is (said is not None)
    assert said is None or any(said in line for line in found)


def transformed(name: str, content: bytes = b"") -> None:
    """Put a transform into an artifact, as the stages do."""
    transform = TargetTransform("center", False, *(np.ones(3, np.float32) for _ in range(3)))
    path = Path(name) / TRANSFORM_FILE
    path.write_bytes(content or transform.to_bytes())
    changes = {"params": {"transform": {"kind": "center"}}} if name == "data/targets" else {}
    edit_manifest(Path(), name, files={TRANSFORM_FILE: file_sha256(path)}, **changes)


def test_a_transform_of_the_targets_goes_with_the_encoder(made: Path) -> None:
    transformed("data/targets")
    assert lines() == ["models/encoder transform.safetensors: is not that of data/targets: run train again"]
    transformed("models/encoder")
    assert lines() == []
    other = TargetTransform("center", True, *(np.ones(3, np.float32) for _ in range(3)))
    transformed("models/encoder", other.to_bytes())
    assert lines() == ["models/encoder transform.safetensors: is not that of data/targets: run train again"]


def test_a_teacher_measured_in_the_space_of_the_targets_is_the_same_teacher(made: Path) -> None:
    transformed("data/targets")
    transformed("models/encoder")
    transform = TargetTransform("center", False, *(np.ones(3, np.float32) for _ in range(3)))
    teacher = read_manifest(made / "data/targets").manifest.models["teacher"]
    name = "results/evaluate/demo"
    edit_manifest(made, name, models={"teacher": teacher | {"transform": transform.identity}})
    assert lines() == []
    for other in (None, {"kind": "whiten", "sha256": "d" * 64}):
        edit_manifest(made, name, models={"teacher": teacher | ({"transform": other} if other else {})})
        (line,) = lines()
        behind = "whiten (dddddddddddd)" if other else "no transform"
        assert line.startswith(f"{name}: measured the teacher behind {behind}, data/targets were made behind center (")
    edit_manifest(made, name, models={"teacher": teacher | {"name": "org/other", "transform": transform.identity}})
    (line,) = lines()
    assert line.startswith(f"{name}: teacher is org/other")


def test_a_transform_that_the_params_do_not_name(made: Path) -> None:
    transformed("data/targets")
    transformed("models/encoder")
    edit_manifest(made, "data/targets", params={"transform": {"kind": "none"}})
    assert lines() == ["data/targets transform.safetensors: is here, the transform is none"]
    flip_byte(Path("models/encoder") / TRANSFORM_FILE, -1)
    assert any("models/encoder transform.safetensors: sha256 is" in line for line in lines())


def test_stale_inputs(made: Path) -> None:
    write_targets(made, teacher={"name": "org/teacher", "revision": "c" * 40})
    write_encoder(made, teacher={"name": "org/teacher", "revision": "c" * 40})
    found = lines()
    assert [line.split(":")[0] for line in found] == ["results/evaluate/demo", "results/probe/interpret"]
    assert "is stale: made from models/encoder with manifest" in found[0]


def test_models_must_agree_along_the_chain(made: Path) -> None:
    other = {"name": "org/other", "revision": "c" * 40}
    write_encoder(made, backbone=other)
    write_result(made, "results/evaluate/demo", {})
    write_result(made, "results/probe/interpret", {})
    assert lines() == [
        "models/encoder: backbone is org/other (cccccccccccc), in data/responses it is org/backbone (aaaaaaaaaaaa)"
    ]


def test_a_local_model_that_changed_or_vanished(workspace: Path) -> None:
    folder = Path("models/lm")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    make_workspace(Path(), backbone=identify(str(folder), None))
    assert lines() == []
    (folder / "config.json").write_text('{"changed": true}')
    (line,) = lines()
    assert line.startswith("data/responses: backbone folder models/lm has changed: sha256 is")
    shutil.rmtree(folder)
    report = audit(Path())
    assert report.findings == []
    assert [item.line() for item in report.unverifiable] == ["data/responses: backbone folder models/lm is not here"]
    assert report.to_dict()["unverifiable"][0]["artifact"] == "data/responses"


def test_a_source_that_changed_is_a_finding_and_an_absent_one_is_not(made: Path) -> None:
    Path("source.txt").write_text("new")
    sources = {"source.txt": "0" * 64, "/nowhere/source.txt": "1" * 64, "hub:org/data/default/train/text": "2" * 64}
    edit_manifest(made, "data/queries", sources=sources)
    now = file_sha256(Path("source.txt"))
    report = audit(made)
    assert [finding.line() for finding in report.findings] == [
        f"data/queries source.txt: is stale: made from this source with sha256 {'0' * 12}..., now it is {now[:12]}..."
    ]
    assert report.findings[0].stale and report.findings[0].of_source
    assert [item.line() for item in report.unverifiable] == [
        "data/queries /nowhere/source.txt: this source is not here"
    ]


def test_many_rows_are_cut_to_a_number() -> None:
    findings = Findings()
    findings.add_rows("data/targets", (f"{index:02d}" for index in range(SHOWN_PER_CHECK + 3)), "bad")
    assert len(findings.items) == SHOWN_PER_CHECK + 1
    assert findings.items[-1] == Finding("data/targets", "3 more rows", "bad")


def test_a_finding_is_one_line() -> None:
    assert Finding("a", "", "two\nlines").line() == "a: two lines"


def write_lock(outs: dict[str, str]) -> None:
    text = "schema: '2.0'\nstages:\n  collect:\n    cmd: x\n    outs:\n"
    for name, md5 in outs.items():
        text += f"    - path: {name}\n      hash: md5\n      md5: {md5}\n      size: 1\n"
    Path("dvc.lock").write_text(text)


def test_lock_that_agrees_is_counted(made: Path) -> None:
    write_lock({"data/queries": dvc_md5(Path("data/queries"))})
    assert audit(made).findings == []
    assert audit(made).locked == 1


def test_lock_mismatch_and_missing_out(made: Path) -> None:
    found = dvc_md5(Path("data/queries"))
    write_lock({"data/queries": "0" * 32 + ".dir", "results/collect.json": "1" * 32})
    assert lines() == [
        f"dvc.lock data/queries: md5 is {found}, stage collect made {'0' * 32}.dir: changed after the run",
        "dvc.lock results/collect.json: is missing, though stage collect made it: run `dvc repro` or `dvc checkout`",
    ]


def test_a_damaged_artifact_is_not_reported_again_by_the_lock(made: Path) -> None:
    write_lock({"data/queries": dvc_md5(Path("data/queries"))})
    flip_byte(Path("data/queries/train.parquet"), 50)
    assert len(lines()) == 1


def test_a_fresh_clone_with_a_lock_has_no_findings(workspace: Path) -> None:
    write_lock({"data/queries": "0" * 32 + ".dir"})
    assert audit(workspace).findings == []


def test_md5_is_what_dvc_computes(workspace: Path) -> None:
    """Against the lock that a real `dvc repro` writes: a folder with a subfolder, and a file with CRLF."""
    Path("make.py").write_text(
        "import pathlib\np = pathlib.Path('out/sub'); p.mkdir(parents=True)\n"
        "(p / 'é.txt').write_bytes(b'x'); (p.parent / 'b').write_bytes(b''); (p.parent / 'sub.txt').write_bytes(b'z')\n"
        "pathlib.Path('one.txt').write_bytes(b'a\\r\\nb')\n"
    )
    Path("dvc.yaml").write_text(f"stages:\n  make:\n    cmd: {sys.executable} make.py\n    outs: [out, one.txt]\n")
    env = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(workspace / ".g"),
        "DVC_SITE_CACHE_DIR": str(workspace / ".s"),
    }
    for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, capture_output=True, env=env)
    report = audit(workspace)
    assert (report.findings, report.locked) == ([], 2)
    Path("out/b").write_text("changed")
    assert [finding.where for finding in audit(workspace).findings] == ["out"]


def test_targets_without_vectors_are_one_finding(made: Path) -> None:
    rewrite(made, "data/targets", PART0, lambda table: table.drop_columns(["embedding"]))
    assert lines() == ["data/targets: column 'embedding' is None, expected a fixed-size list"]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_an_encoder_config_that_is_no_mapping_is_a_finding(made: Path, content: str) -> None:
    config = Path("models/encoder/encoder_config.json")
    config.write_text(content)
    edit_manifest(made, "models/encoder", files={config.name: file_sha256(config)})
    assert lines() == ["models/encoder encoder_config.json: holds no mapping in JSON: run train again"]


@pytest.mark.parametrize(("key", "value"), [("params", None), ("files", []), ("counts", None), ("rows", "5")])
def test_a_manifest_with_values_of_another_kind_is_damaged(made: Path, key: str, value: Any) -> None:
    edit_manifest(made, "data/responses", **{key: value})
    [line] = [line for line in lines() if line.startswith("data/responses manifest.json")]
    assert f"is damaged ({key} is {value!r}): run the stage again" in line


@pytest.mark.parametrize("content", ["stages:\n", "stages: {collect: null}\n", "stages: {collect: {outs: null}}\n"])
def test_a_lock_without_outs_has_nothing_to_compare(made: Path, content: str) -> None:
    Path("dvc.lock").write_text(content)
    report = audit(made)
    assert (report.findings, report.locked) == ([], 0)
