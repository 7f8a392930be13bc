"""The paper's figures stand beside a run's own only where both measured the same, and are marked as published."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.presets import presets
from pipeline.core.errors import ParamsError
from pipeline.core.files import write_json
from pipeline.evaluate.comparison import compare
from pipeline.report.content import gather
from pipeline.report.published import Measured, PaperComparison, compare_with_paper, load_published
from pipeline.report.render import render_html, render_markdown
from pipeline.tasks.suites import named_suites
from tests.toy_workspace import edit_manifest, make_workspace

QWEN = "Qwen/Qwen3-8B"
MTEB = {"local": [], "tasks": [], "benchmark": "MTEB(eng, v2)", "languages": None}
ADVBENCH = {"dataset": "McGill-NLP/AdvBench-IR-chunked", "local": None}
SYSTEMS = {"student": {}, "teacher": {}, "untrained": {}}
MEANS = {
    "student/SomeSTS": 0.7, "student/type/STS": 0.7015, "student/type/Retrieval": 0.4, "student/mean/tasks": 0.55,
    "untrained/type/STS": 0.5,
}  # fmt: skip
HARM = {"requests": 520, "student/accuracy@5": 0.5, "teacher/accuracy@5": 0.625}


def measured(name: str, metrics: dict[str, Any], settings: Any) -> Measured:
    return Measured(compare(name, {"metrics": metrics, "systems": SYSTEMS}), settings)


def against(backbone: str | None, *own: Measured) -> PaperComparison:
    return compare_with_paper(load_published(), backbone, own)


def test_categories_stand_beside_ours_in_percent() -> None:
    (table,) = against(QWEN, measured("mteb", MEANS, MTEB)).tables
    assert list(table.published.columns.values()) == [
        "Retr.",
        "Rerank.",
        "Clust.",
        "Pair",
        "Class.",
        "STS",
        "Summ.",
        "Avg",
    ]
    by_origin = {(line.system, line.origin): line.values for line in table.lines}
    assert by_origin["LLM2Vec-Gen", "published, arXiv 2603.10913v2"][-1] == 61.9
    assert by_origin["LLM2Vec-Gen", "published, arXiv 2603.10913v1"] == [None] * 7 + [62.1]
    assert by_origin["student", "measured here"] == pytest.approx([40, None, None, None, None, 70.15, None, 55])
    # Only the systems of the paper have a row of ours, and only those that were measured.
    assert [line.system for line in table.lines if not line.published] == ["student"]


def test_our_row_follows_the_published_one_that_it_answers_to() -> None:
    (table,) = against("Qwen/Qwen3-4B", measured("safety", HARM, ADVBENCH)).tables
    assert [(line.system, line.published, line.values) for line in table.lines] == [
        ("LLM2Vec, the teacher", True, [50.8]), ("teacher", False, [62.5]),
        ("LLM2Vec-Gen", True, [42.5]), ("student", False, [50.0]),
    ]  # fmt: skip
    assert table.published.lower_is_better


def test_another_backbone_gets_no_figures() -> None:
    paper = against("org/other", measured("mteb", MEANS, MTEB))
    assert (paper.tables, paper.unmeasured, paper.sources) == ([], [], [])
    assert paper.backbones == [f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")]


@pytest.mark.parametrize(
    ("metrics", "settings"),
    [
        (MEANS, {**MTEB, "tasks": ["SciFact"]}),
        (MEANS, {**MTEB, "local": ["own"]}),
        (MEANS, {**MTEB, "languages": ["eng"]}),
        (MEANS, {**MTEB, "benchmark": "MTEB(eng, v1)"}),
        (MEANS, None),
        (HARM, {"dataset": None, "local": "own"}),
        ({**HARM, "requests": 60}, ADVBENCH),
        ({"student/BrightPonyRetrieval": 0.5, "student/mean/tasks": 0.5}, {"tasks": ["BrightPonyRetrieval"]}),
    ],
)
def test_a_suite_or_probe_that_measures_something_else_does_not_match(metrics: dict[str, Any], settings: Any) -> None:
    paper = against(QWEN, measured("x", metrics, settings))
    assert paper.tables == []
    assert paper.unmeasured == [
        "MTEB(eng, v2), 41 tasks, means by category", "AdvBench-IR, top-5 accuracy",
        "BRIGHT, nDCG@10, mean over 12 domains",
    ]  # fmt: skip


def test_all_twelve_domains_are_bright() -> None:
    bright = next(table for table in load_published().tables if table.title.startswith("BRIGHT"))
    assert len(bright.match.tasks) == 12
    metrics = {f"student/{task}": 0.25 for task in bright.match.tasks} | {"student/mean/tasks": 0.25}
    (table,) = against(QWEN, measured("reasoning", metrics, {"local": [], "tasks": []})).tables
    assert [line.values for line in table.lines] == [[14.9], [20.2], [25.0]]


def test_names_in_the_file_are_ours() -> None:
    published = load_published()
    backbones = {preset.backbone.name for preset in presets().values()}
    assert {name for table in published.tables for name in table.backbones} <= backbones
    assert {table.match.benchmark for table in published.tables} - {None, "MTEB(eng, v2)"} <= set(named_suites())


BROKEN = """
tables:
  - title: T
    source: {title: P, arxiv: "2603.10913", version: v2}
    match: {MATCH}
    columns: {mean/tasks: Avg}
    backbones: {b: [{system: S, values: VALUES}]}
"""


@pytest.mark.parametrize(
    ("match", "values", "message"),
    [
        ("benchmark: B", "[1.0, 2.0]", "T, b, S: 2 values for 1 columns"),
        ("benchmark: B, tasks: [t]", "[1.0]", "exactly one of benchmark, tasks, datasets"),
        ("benchmark: B", "['1.0']", "valid number"),
        ("bench: B", "[1.0]", "match.bench: unknown key"),
    ],
)
def test_the_file_is_read_strictly(tmp_path: Path, match: str, values: str, message: str) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(BROKEN.replace("MATCH", match).replace("VALUES", values))
    with pytest.raises(ParamsError, match=message):
        load_published(path)


def pages(suites: dict[str, Any]) -> list[str]:
    content = gather("Toy", suites, {})
    return [render_html(content), render_markdown(content)]


@pytest.fixture
def run_of_qwen(workspace: Path) -> Path:
    make_workspace(Path())
    edit_manifest(Path(), "models/encoder", models={"backbone": {"name": QWEN, "revision": "a" * 40}})
    write_json(Path("results/evaluate/mteb.json"), {"metrics": MEANS, "systems": SYSTEMS})
    return workspace


def test_pages_mark_what_is_published(run_of_qwen: Path) -> None:
    html, markdown = pages({"mteb": MTEB})
    assert '<tr class="pub"><td>InBedder</td><td>published, arXiv 2603.10913v2</td><td class="n">11.0</td>' in html
    assert '<tr class="sum"><td>student</td><td>measured here</td><td class="n">40.0</td><td class="n">–</td>' in html
    assert "| student | measured here | 40.0 | – | – | – | – | 70.2 | – | 55.0 |" in markdown.splitlines()
    for page in (html, markdown):
        assert "not measured in this run: AdvBench-IR, top-5 accuracy; BRIGHT" in page
        assert "not measured here" in page


def test_pages_of_another_suite_show_no_published_figure(run_of_qwen: Path) -> None:
    for page in pages({"mteb": {**MTEB, "tasks": ["Extra"]}}):
        assert "InBedder" not in page
        assert "not measured in this run: MTEB(eng, v2), 41 tasks" in page


def test_pages_of_another_backbone_say_which_have_figures(workspace: Path) -> None:
    assert all("The backbone is not known. There are figures for Qwen/Qwen3-0.6B, " in page for page in pages({}))
    make_workspace(Path())
    write_json(Path("results/evaluate/mteb.json"), {"metrics": MEANS, "systems": SYSTEMS})
    for page in pages({"mteb": MTEB}):
        assert "not for this backbone, org/backbone. There are figures for Qwen/Qwen3-0.6B, Qwen/Qwen3-1.7B, " in page
        assert "61.9" not in page
