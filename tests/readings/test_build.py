"""The command on a workspace with a tiny backbone: what is measured, and what a second run reads."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.backbone.loading import identify
from pipeline.core.artifacts import create
from pipeline.core.config import load, read_yaml
from pipeline.core.errors import PipelineError
from pipeline.core.schemas import QUERIES, RESPONSES, targets_schema
from pipeline.core.target_transform import TransformParams
from pipeline.embed.transform_fit import fit_transform
from pipeline.encoder.folder.config import ResponseForm
from pipeline.readings import build
from pipeline.readings.build import Found, Inputs, Request, run
from pipeline.readings.states import TemplateStates
from tests.evaluate.fakes import classification_folder, retrieval_folder, sts_folder
from tests.stage_runs import RESPONSE, row_id, write_params, write_queries, write_responses
from tests.train.conftest import TRAIN, write_targets

TEXTS = [f"question number {number}: what is {word}?" for number in range(10) for word in ("apple", "bread", "cloud")]


@pytest.fixture
def inputs(workspace: Path, tiny_backbone: Callable[..., Path]) -> Inputs:
    """A workspace whose answers are its queries and whose tasks are three small folders."""
    write_queries(TEXTS)
    write_responses(TEXTS)
    for make in (retrieval_folder, sts_folder, classification_folder):
        make(workspace / "tasks" / make.__name__)
    write_params(
        backbone={"name": str(tiny_backbone("llama")), "dtype": "float32"},
        train=TRAIN,
        evaluate={
            "systems": ["student"], "local_dir": "tasks", "dtype": "float32", "bootstrap": {"resamples": 100}
        },
        suites={"all": {"local": ["retrieval_folder", "sts_folder"]}, "more": {"local": ["classification_folder"]}},
    )  # fmt: skip
    return load(Path("params.yaml"), Inputs)


UNTRAINED = [("raw", None), ("standardized", None), ("decorrelated", None)]
CHOSEN = Request(readings=["echo", "tokens"], shares=[0.5, 1.0])


def by_setting(found: Found) -> dict[tuple[str, str, float | None], Any]:
    return {(line.reading, line.kind, line.share): line for line in found.lines}


def test_every_setting_is_scored_on_every_task(inputs: Inputs) -> None:
    found = run(inputs, CHOSEN)
    assert found.tasks == ["retrieval_folder", "sts_folder", "classification_folder"]
    assert (found.rows, found.heldout, found.answered) == (27, 3, True)
    lines = by_setting(found)
    kinds = [*UNTRAINED, ("closed form", 0.5), ("closed form", 1.0)]
    assert list(lines) == [(reading, *kind) for reading in ("echo", "tokens") for kind in kinds]
    for line in found.lines:
        assert set(line.scores) == set(found.tasks)
        assert line.mean.value == pytest.approx(np.mean(list(line.scores.values())), abs=1e-5)
        assert line.mean.low <= line.mean.value <= line.mean.high
    untrained = [line for line in found.lines if line.share is None]
    best = max(untrained, key=lambda line: line.mean.value)
    assert (best.gain.value, best.gain.low, best.gain.high) == (0, 0, 0)
    for line in found.lines:
        assert line.gain.value == pytest.approx(line.mean.value - best.mean.value, abs=2e-6)
    # The answers are the queries: a reading finds each at itself.
    assert all(line.top1.value == 1.0 for line in untrained)


def test_a_second_run_passes_nothing_through_the_backbone(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(inputs, CHOSEN)

    def never(self: TemplateStates, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
        raise AssertionError(f"{len(texts)} texts are read again")

    monkeypatch.setattr(TemplateStates, "encode", never)
    again = run(inputs, CHOSEN)
    assert again == first
    # Another share needs no state that is not kept.
    assert len(run(inputs, Request(readings=["echo"], shares=[0.2, 0.8])).lines) == 5


def test_the_closed_form_is_fitted_on_the_training_rows_alone(inputs: Inputs) -> None:
    """Held-out answers, of which each is another query's, change top-1 and nothing else."""
    before = run(inputs, CHOSEN)
    heldout = TEXTS[::10]
    swapped = dict(zip(heldout, heldout[1:] + heldout[:1], strict=True))
    shutil.rmtree("data/responses")
    write_responses(TEXTS, **{text: {"response": other} for text, other in swapped.items()})
    after = run(inputs, CHOSEN)
    for old, new in zip(before.lines, after.lines, strict=True):
        assert (old.scores, old.mean, old.ridge) == (new.scores, new.mean, new.ridge)
    assert all(line.top1.value == 0 for line in after.lines if line.share is None)


def test_draws_behind_each_other_share_no_row(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    monkeypatch.setattr(build, "LEAST_ROWS", 9)
    monkeypatch.setattr(build, "measure", lambda backbone, names, train, *rest: read.append(train.queries) or [])
    for skip in (0, 9, 18):
        run(inputs, Request(rows=9, skip=skip))
    assert sorted(text for draw in read for text in draw) == sorted(set(TEXTS) - set(TEXTS[::10]))


def test_stored_targets_and_a_refinement(inputs: Inputs) -> None:
    ids = sorted(map(row_id, TEXTS))
    vectors = [{"id": name, "embedding": [float(int(name[:2], 16)), 1.0, 2.0]} for name in ids]
    write_targets(pa.Table.from_pylist(vectors, targets_schema(3, "float32")))
    found = run(inputs, Request(readings=["echo"], shares=[0.5, 1.0], targets="stored", refine=True))
    kinds = [*UNTRAINED, *((k, a) for k in ("closed form", "refined") for a in (0.5, 1.0))]
    assert list(by_setting(found)) == [("echo", *kind) for kind in kinds]
    echo = by_setting(run(inputs, Request(readings=["echo"], shares=[1.0])))
    assert by_setting(found)["echo", "closed form", 1.0].scores != echo["echo", "closed form", 1.0].scores
    assert by_setting(found)["echo", "raw", None] == echo["echo", "raw", None]
    with pytest.raises(PipelineError, match="decorrelate"):
        run(inputs, Request(targets="stored", decorrelate=0.5))
    shutil.rmtree("data/responses")
    with pytest.raises(PipelineError, match="data/responses"):
        run(inputs, Request(targets="stored"))


def test_decorrelated_targets_stand_beside_a_decorrelated_reading(inputs: Inputs) -> None:
    plain, decorrelated = (
        by_setting(run(inputs, Request(readings=["echo"], shares=[1.0], decorrelate=power, shrinkage=held)))
        for power, held in ((0.0, "auto"), (0.5, 0.3))
    )
    standardized, alone, closed_form = (
        ("echo", kind, share) for kind, share in (("standardized", None), ("decorrelated", None), ("closed form", 1.0))
    )
    assert decorrelated[standardized].scores == plain[standardized].scores != decorrelated[alone].scores
    assert decorrelated[alone].scores == plain[alone].scores
    assert decorrelated[closed_form].scores != plain[closed_form].scores
    # The bar is the best line without a prediction, the decorrelated one among them.
    bar = max(line.mean.value for line in decorrelated.values() if line.share is None)
    gain = decorrelated[closed_form].mean.value - bar
    assert decorrelated[closed_form].gain.value == pytest.approx(gain, abs=2e-6)


@pytest.mark.parametrize("form", ["added", "beside"])
def test_the_reading_may_be_decorrelated_too(inputs: Inputs, form: ResponseForm) -> None:
    added = Request(readings=["echo"], shares=[0.001, 1.0], form=form, decorrelate=0.5)
    plain, likewise = (by_setting(run(inputs, replace(added, decorrelate_reading=own))) for own in (False, True))
    # Next to nothing is predicted: the embedding is the reading, standardised or decorrelated.
    for found, kind in ((plain, "standardized"), (likewise, "decorrelated")):
        sts = [found["echo", *key].scores["sts_folder"] for key in ((kind, None), ("closed form", 0.001))]
        assert sts[0] == pytest.approx(sts[1], abs=0.05)
    alone = "echo", "closed form", 1.0
    assert plain[alone].scores == likewise[alone].scores


def test_stored_targets_are_added_where_the_teacher_embedded_the_queries(inputs: Inputs) -> None:
    added = Request(readings=["echo"], shares=[0.5, 1.0], targets="stored", form="added")
    draw = np.random.default_rng(0)
    columns, ids = ("embedding", "query_embedding"), sorted(map(row_id, TEXTS))
    rows = [{"id": row, **{name: draw.normal(size=3).tolist() for name in columns}} for row in ids]
    write_targets(pa.Table.from_pylist(rows, targets_schema(3, "float32", queries=True)))
    with pytest.raises(PipelineError, match=r"form: added.*embed\.queries: true"):  # the params of the targets say no
        run(inputs, added)
    write_targets(pa.Table.from_pylist(rows, targets_schema(3, "float32", queries=True)), queries=True)
    summed, beside = run(inputs, added), run(inputs, replace(added, form="beside"))
    lines, others = by_setting(summed), by_setting(beside)
    assert lines["echo", "closed form", 0.5].scores != others["echo", "closed form", 0.5].scores
    assert lines["echo", "closed form", 1.0].ridge == others["echo", "closed form", 1.0].ridge


def stored_targets(width: int, teacher: dict[str, str]) -> None:
    """Standardised targets of a backbone, of random vectors."""
    ids = sorted(map(row_id, TEXTS))
    vectors = np.random.default_rng(0).normal(size=(len(ids), width))
    fitted = fit_transform(TransformParams(kind="standardize"), [vectors], unit_length=False).transform
    rows = [{"id": name, "embedding": row.tolist()} for name, row in zip(ids, fitted(vectors), strict=True)]
    identity = {"kind": "backbone", "pooling": "mean", **teacher}
    write_targets(pa.Table.from_pylist(rows, targets_schema(width, "float32")), identity, fitted)


@pytest.mark.parametrize("width", [8, 32])
def test_targets_of_another_backbone_are_not_added_to_readings(inputs: Inputs, width: int) -> None:
    stored_targets(width, {"name": "org/another"})
    with pytest.raises(PipelineError, match=r"^form: added"):
        run(inputs, replace(CHOSEN, targets="stored", form="added"))


def answers_by(backbone: dict[str, str]) -> None:
    """Answers, equal to the queries, that a backbone of this identity wrote."""
    shutil.rmtree("data/responses")
    rows = [{"id": row_id(text), "response": text, **RESPONSE} for text in TEXTS]
    with create(Path("data/responses"), kind="responses", params={}, models={"backbone": backbone}) as out:
        out.write_parts([pa.Table.from_pylist(sorted(rows, key=itemgetter("id")), schema=RESPONSES)], RESPONSES)


def test_answers_of_another_backbone_are_refused(inputs: Inputs) -> None:
    answers_by({"name": "org/b"})
    with pytest.raises(PipelineError, match="data/responses was written by .*org/b"):
        run(inputs, CHOSEN)


def test_a_backbone_that_lies_elsewhere_wrote_its_answers(inputs: Inputs) -> None:
    answers_by({**identify(inputs.backbone.name, None), "name": "models/elsewhere"})
    assert run(inputs, Request(readings=["tokens"], suite="more")).answered


def test_stored_targets_need_no_heldout_queries(inputs: Inputs) -> None:
    shutil.rmtree("data/queries")
    rows = [{"id": row_id(text), "text": text, "source": "x"} for text in TEXTS]
    with create(Path("data/queries"), kind="queries", params={}) as out:
        out.write_table("train.parquet", pa.Table.from_pylist(sorted(rows, key=itemgetter("id")), schema=QUERIES))
        out.write_table("heldout.parquet", QUERIES.empty_table())
    stored_targets(3, {"name": "org/another"})
    found = run(inputs, replace(CHOSEN, targets="stored", suite="more"))
    assert (found.rows, found.heldout) == (30, 0)
    assert {line.top1 for line in found.lines} == {None}


def test_what_the_student_reads_otherwise_is_said(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    params = read_yaml(Path("params.yaml"))
    write_params(**params | {"train": {**params["train"], "too_long": "keep_end", "max_query_tokens": 64}})
    run(load(Path("params.yaml"), Inputs), Request(readings=["tokens"], suite="more"))
    assert "train.too_long keep_end" in caplog.text


def test_queries_that_are_read_alike_name_the_limit(inputs: Inputs) -> None:
    params = read_yaml(Path("params.yaml"))
    write_params(**params | {"train": {**params["train"], "max_query_tokens": 8}})
    with pytest.raises(PipelineError, match=r"all 27 texts alike.*train\.max_query_tokens"):
        run(load(Path("params.yaml"), Inputs), CHOSEN)


def test_without_answers_or_tasks(inputs: Inputs) -> None:
    shutil.rmtree("data/responses")
    bare = inputs.model_copy(update={"suites": {"none": inputs.suites["all"].model_copy(update={"local": []})}})
    found = run(bare, CHOSEN)
    assert (found.answered, found.tasks) == (False, [])
    assert [(line.kind, line.mean, line.top1, line.gain) for line in found.lines] == [
        (kind, None, None, None) for _ in range(2) for kind, _ in UNTRAINED
    ]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(readings=["ecco"]), "ecco"),
        (Request(shares=[0.5, 1.5]), "1.5"),
        (Request(suite="most"), "most"),
        (Request(rows=5), "5 training queries"),
        (Request(shrinkage=0.3), "0.3 needs --decorrelate"),
        (Request(form="added", decorrelate_reading=True), "needs --decorrelate"),
    ],
)
def test_what_does_not_exist_is_named(inputs: Inputs, request_: Request, says: str) -> None:
    with pytest.raises(PipelineError, match=says):
        run(inputs, request_)


def test_a_suite_has_its_own_tasks(inputs: Inputs) -> None:
    assert run(inputs, Request(suite="more", readings=["echo"], shares=[1.0])).tasks == ["classification_folder"]


def test_the_command_prints_a_table_or_json(inputs: Inputs) -> None:
    options = ["readings", "--reading", "echo", "--share", "0.5", "--suite", "all"]
    shown = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "echo" in shown.output and "standardized" in shown.output and "27 training queries" in shown.output
    printed = CliRunner().invoke(app, [*options, "--json"])
    content = json.loads(printed.stdout)
    assert [line["kind"] for line in content["lines"]] == ["raw", "standardized", "decorrelated", "closed form"]
    assert set(content["lines"][0]["scores"]) == {"retrieval_folder", "sts_folder"}
    wrong = CliRunner().invoke(app, ["readings", "--reading", "ecco"])
    assert wrong.exit_code == 1
    assert "--reading" in wrong.output and "ecco" in wrong.output


@pytest.mark.slow
@pytest.mark.models
def test_a_real_backbone_finds_first_words(inputs: Inputs, small_lm: Path) -> None:
    """Passages and classes that share a first word with the text, by real states in every form that needs no answer."""
    real = inputs.model_copy(update={"backbone": inputs.backbone.model_copy(update={"name": str(small_lm)})})
    for line in run(real, Request(readings=["echo", "tokens"], shares=[0.5])).lines:
        if line.share is None:
            # Correlations of 27 rows in 576 dimensions are mostly noise.
            least = 0.8 if line.kind == "decorrelated" else 0.99
            assert min(line.scores["retrieval_folder"], line.scores["classification_folder"]) > least
