"""The report says what the results say, names what is missing, and is one safe file."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.artifacts import create
from pipeline.core.files import write_json
from pipeline.core.paths import REPORT_PAGES
from pipeline.evaluate.comparison import Cell
from pipeline.report.__main__ import Inputs, run
from pipeline.report.charts import curve_svg, running_mean
from pipeline.report.content import gather
from pipeline.report.render import (
    breakable,
    escape_markdown,
    interval,
    label,
    number,
    percent,
    render_html,
    render_markdown,
    seconds,
    signed,
    size,
)
from pipeline.report.sections import audit_workspace
from tests.report.toy_results import EVIL, NOT_DRAWN, RECORD, SAFETY, SUITE, SYSTEMS, content_of
from tests.toy_workspace import edit_manifest, flip_byte


def test_nothing_is_missing_from_a_finished_workspace(made: Path) -> None:
    content = content_of()
    assert content.missing == []
    assert content.stubs == []
    assert [run.name for run in content.runs] == [
        "collect", "generate", "embed", "train", "evaluate demo", "probe alignment", "probe safety", "probe interpret",
    ]  # fmt: skip
    assert content.models == [("backbone", "org/backbone", "a" * 16), ("teacher", "org/teacher", "b" * 16)]
    assert [(name, rows) for name, rows, _ in content.data][:3] == [
        ("data/queries", 5), ("data/responses", 5), ("data/targets", 3),
    ]  # fmt: skip


def test_the_pages_hold_the_numbers(made: Path) -> None:
    for page in (render_html(content_of()), render_markdown(content_of())):
        for expected in ("0.610", "0.750", "0.680", "0.625", "−0.125", "org/backbone", "1 min 5 s", "0.200", "Toy"):
            assert expected in page, expected


def test_html_is_one_safe_file(made: Path) -> None:
    page = render_html(content_of())
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    tags = Tags()
    tags.feed(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(tags.seen)
    assert len(tags.addresses) > 5
    assert [address for address in tags.addresses if not address.startswith("#")] == []
    assert set(re.findall(r"url\(\s*[\"']?(.)", page)) <= {"#"}
    assert "@import" not in page
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert {address[1:] for address in tags.addresses} <= set(tags.ids)


class Tags(HTMLParser):
    """Collects tags, ids and addresses, and checks that each tag is closed in order."""

    VOID = {"meta", "br", "wbr", "img", "link", "input"}
    LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "formaction", "poster", "ping", "background"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in self.LOADING]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_losses_and_heldout_scores_are_drawn(made: Path) -> None:
    page = render_html(content_of())
    for curve in ("alignment loss", "reconstruction loss", "held-out cosine to the target"):
        assert f'aria-label="{curve}"' in page


def test_a_loss_that_was_not_trained_is_not_drawn(made: Path) -> None:
    Path("results/train/loss.csv").write_text("step,loss,align,recon,learning_rate\n1,2,2,nan,1\n2,1,1,nan,1\n")
    page = render_html(content_of())
    assert 'aria-label="alignment loss"' in page
    assert 'aria-label="reconstruction loss"' not in page


def test_equal_results_give_equal_bytes(made: Path) -> None:
    assert render_html(content_of()) == render_html(content_of())


def test_pages_for_a_workspace_with_nothing(workspace: Path) -> None:
    content = content_of()
    assert len(content.missing) == 4 + 4 + 2 + 1 + 3
    assert "not made yet" in render_html(content)
    assert "results/probe/safety.json" in render_markdown(content).replace("\\", "")


def test_each_missing_piece_is_named_and_the_rest_stays(made: Path) -> None:
    Path("results/probe/safety.json").unlink()
    Path("results/train/loss.csv").write_text("step,align\n1,what\n")
    Path("results/embed.json").write_text("{")
    shutil.rmtree("results/probe/interpret")
    content = content_of()
    joined = "\n".join(content.missing)
    for name in (
        "results/probe/safety.json: not made yet",
        "loss.csv is damaged",
        "embed.json is damaged",
        "results/probe/interpret",
    ):
        assert name in joined
    assert len(content.missing) == 4
    assert "0.610" in render_html(content)


def test_entries_that_params_no_longer_name_are_left_out(made: Path) -> None:
    write_json(Path("results/evaluate/old.json"), {"metrics": {"student/Old": 0.9}, "systems": SYSTEMS, **RECORD})
    assert [table.name for table in content_of().suites] == ["demo"]


def test_stubs_are_flagged(made: Path) -> None:
    edit_manifest(made, "data/responses", params={"generate": {"engine": "echo", "stub": True}})
    write_json(Path("results/embed.json"), {"stage": "embed", "stub": True, **RECORD})
    content = content_of()
    assert content.stubs == ["data/responses", "embed"]
    assert "Not a real run" in render_html(content)
    assert "Not a real run" in render_markdown(content)


def test_samples_name_each_near_word_once_by_rank(made: Path) -> None:
    assert content_of().samples[0].vocabulary == ["law", "illegal", "court"]


def test_the_curve_is_drawn_from_the_numbers() -> None:
    assert running_mean([1.0, 3.0]) == [1.0, 3.0]
    assert running_mean([float(value) for value in range(20)])[-1] == 18.5
    svg = curve_svg([1, 2, 3], [3.0, 2.0, 1.0], "alignment loss")
    assert svg.startswith("<svg role=")
    assert "currentColor" in svg
    assert "alignment loss" in svg


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234, "1,234"), (0.12345, "0.123"), (True, "True"), ("auto", "auto")]
)
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


def test_durations_signs_and_cells() -> None:
    assert [seconds(value) for value in (3.21, 65, 7260)] == ["3.2 s", "1 min 5 s", "2 h 1 min"]
    assert (signed(0.5), signed(-0.5)) == ("+0.500", "−0.500")
    assert escape_markdown("a|b\n<c>") == "a\\|b &lt;c&gt;"
    assert [size(value) for value in (72_000_000, 1_536_000_000, 384_000)] == ["72 MB", "1.54 GB", "0.384 MB"]
    assert breakable("a/<b>") == "a/<wbr>&lt;b&gt;"
    assert (percent(None), percent(61.94), percent(-0.5)) == ("–", "61.9", "−0.5")
    assert label("backbone/refusal_rate_safe") == "backbone: refusal rate safe"
    assert interval(Cell(0.5, 0.1, -0.05, 0.25)) == "[−0.050, +0.250]"
    assert interval(Cell(0.5, 0.1)) == ""


def test_stage_writes_both_pages(made: Path) -> None:
    inputs = Inputs.model_validate({"report": {"title": "Stage"}, "suites": {"demo": {}}, "probes": {"alignment": {}}})
    run(inputs)
    html, markdown = Path("results/report.html").read_text(), Path("results/report.md").read_text()
    assert "<title>Stage</title>" in html
    assert markdown.startswith("# Stage\n")
    for page in (html, markdown):
        assert "No findings in 6 artifacts" in page
    assert json.loads(Path("results/collect.json").read_text())["seconds"] == 65.0


def lines_of(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


def test_markdown_has_score_difference_verdict_and_interval_in_one_cell(judged: Path) -> None:
    page = render_markdown(content_of())
    assert lines_of(page, "| Facts") == ["| Facts | 0.500 | 0.625<br>−0.125 within noise<br>[−0.300, +0.050] |"]
    assert lines_of(page, "| mean/tasks") == ["| mean/tasks | 0.500 | 0.625<br>−0.125 no interval |"]
    assert lines_of(page, "| accuracy@1") == ["| accuracy@1 ↓ | 0.200 | 0.600<br>−0.400 better<br>[−0.500, −0.300] |"]
    # A record without intervals shows the bare difference and claims nothing.
    assert lines_of(page, "| top1") == ["| top1 | 0.750 | 0.910<br>−0.160 |"]


def test_html_says_the_verdict_in_words_and_colours_only_what_is_no_noise(judged: Path) -> None:
    page = render_html(content_of())
    assert '<th scope="row">accuracy@1&nbsp;↓</th>' in page
    assert '<span class="d good"><span>−0.400</span> <span>better</span></span>' in page
    assert '<span class="d"><span>[−0.500, −0.300]</span></span>' in page
    assert '<span class="d"><span>−0.125</span> <span>within noise</span></span>' in page
    assert '<span class="d"><span>−0.160</span></span>' in page
    assert page.count('class="d good"') == 1
    assert 'class="d bad"' not in page


def test_systems_are_described_once_and_exceptions_at_their_table(made: Path) -> None:
    systems = {**SYSTEMS, "teacher": {**SYSTEMS["teacher"], "prompting": "own prompt 'x: '"}}
    write_json(Path("results/probe/safety.json"), {"metrics": SAFETY, "systems": systems, **RECORD})
    content = content_of()
    assert [(facts.name, facts.model, facts.prompting) for facts in content.systems] == [
        ("student", "", "generative instruction"), ("teacher", "", "bare text"),
    ]  # fmt: skip
    assert content.suites[0].prompting == {}
    assert content.probes[0].prompting == {"teacher": "own prompt 'x: '"}
    for page in (render_html(content), render_markdown(content)):
        assert page.count("generative instruction") == 1
        assert page.count("Read differently here") == 1


def test_a_probe_without_instruction_does_not_hide_what_is_read_elsewhere(made: Path) -> None:
    Path("results/evaluate/demo.json").unlink()
    content = content_of()
    assert content.alignment is not None
    assert content.alignment.prompting == {}
    assert [facts.prompting for facts in content.systems] == ["generative instruction", "bare text"]


def test_the_models_of_systems_are_named(made: Path) -> None:
    parts = {"engine": {"name": "org/backbone"}, "teacher": {"name": "org/teacher"}, "tokens": 10}
    systems = {
        "student": {"identity": {"name": "encoder", "config": {"backbone": {"name": "org/backbone"}}}},
        "hyde": {"identity": parts},
    }
    metrics = {"student/Facts": 0.5, "hyde/Facts": 0.25}
    write_json(Path("results/evaluate/demo.json"), {"metrics": metrics, "systems": systems, **RECORD})
    models = {facts.name: facts.model for facts in content_of().systems}
    assert models == {"student": "encoder", "teacher": "", "hyde": "org/backbone, org/teacher"}


def test_random_starts_are_summed_up(made: Path) -> None:
    metrics = {"student/mean/tasks": 0.5, "untrained/mean/tasks": 0.2, "untrained-1/mean/tasks": 0.4}
    record = {"metrics": metrics, "systems": {"student": {}, "untrained": {}, "untrained-1": {}}, **RECORD}
    write_json(Path("results/evaluate/demo.json"), record)
    for page in (render_html(content_of()), render_markdown(content_of())):
        assert "Over 2 random starts, mean ± standard deviation: untrained, mean/tasks 0.300 ± 0.141" in page
        assert page.count("random starts") == 1


def test_the_student_is_compared_with_the_best_untrained_reading_and_its_start(made: Path) -> None:
    scores = {"student": 0.5, "start": 0.48, "echo": 0.3, "echo-standardized": 0.45, "backbone-mean": 0.2}
    metrics = {f"{name}/mean/tasks": score for name, score in scores.items()}
    over = {"metric": "mean/tasks", "units": 9}
    deltas = [
        {**over, "system": "echo-standardized", "delta": 0.05, "low": 0.01, "high": 0.09, "verdict": "better"},
        {**over, "system": "start", "delta": 0.02, "low": -0.01, "high": 0.05, "verdict": "within noise"},
    ]
    record = {"metrics": metrics, "deltas": deltas, "systems": {key: {} for key in scores}, **RECORD}
    write_json(Path("results/evaluate/demo.json"), record)
    said = (
        "mean/tasks: the student has 0.500, the best untrained reading (echo-standardized) 0.450: training added "
        "+0.050 [+0.010, +0.090], better; over its own start +0.020 [-0.010, +0.050], within noise"
    )
    for page in (render_html(content_of()), render_markdown(content_of()).replace("\\", "")):
        assert said in page
        assert page.count("What training added") == 1 + ("<table" in page)


def test_smaller_vectors_stand_beside_the_whole_ones(made: Path) -> None:
    lost = {**NOT_DRAWN, "system": "student-binary", "delta": -0.03, "low": -0.05, "high": -0.01, "verdict": "worse"}
    forms: list[dict[str, Any]] = [
        {"stored": "float32", "dimensions": 576, "bytes_per_million": 2_304_000_000, "deltas": []},
        {"stored": "binary", "dimensions": 576, "bytes_per_million": 72_000_000, "deltas": [lost]},
    ]
    forms = [{**form, "scores": {"mean/tasks": 0.5 - 0.03 * n, "Facts": 0.4}} for n, form in enumerate(forms)]
    write_json(Path("results/evaluate/demo.json"), {"metrics": SUITE, "systems": SYSTEMS, "stored": forms, **RECORD})
    page = render_markdown(content_of())
    assert lines_of(page, "| float32") == ["| float32 | 576 | 2.3 GB | 0.500 |"]
    assert lines_of(page, "| binary") == ["| binary | 576 | 72 MB | 0.470<br>−0.030 worse<br>[−0.050, −0.010] |"]
    assert "| stored as | dimensions | a million vectors | mean/tasks |" in page
    assert "72 MB" in render_html(content_of())


def test_refusal_probe(made: Path) -> None:
    metrics = {
        "backbone/refused_safe": 0.04, "backbone/refused_unsafe": 0.9,
        "student/over_refusal": 0.1, "student/auroc": 0.9, "teacher/over_refusal": 0.2, "teacher/auroc": 0.8,
    }  # fmt: skip
    write_json(Path("results/probe/refusal.json"), {"metrics": metrics, "systems": SYSTEMS, **RECORD})
    content = gather("Toy", {}, {"refusal": {}})
    assert [(row.metric, row.lower_is_better) for row in content.probes[0].rows] == [
        ("auroc", False), ("over_refusal", True),
    ]  # fmt: skip
    for page in (render_html(content), render_markdown(content).replace("\\", "")):
        assert "backbone: refused safe 0.040; backbone: refused unsafe 0.900" in page
        assert "cannot be safer than the model" in page


def test_the_audit_is_on_both_pages_and_can_be_left_out(made: Path) -> None:
    flip_byte(Path("models/encoder/student.safetensors"), -1)
    sections: dict[str, Any] = {"report": {"title": "Stage"}, "suites": {}, "probes": {}}
    run(Inputs.model_validate(sections))
    for page in ("results/report.html", "results/report.md"):
        assert "1 finding: " in Path(page).read_text()
        assert "student.safetensors: sha256 is" in Path(page).read_text()
    sections["report"]["audit"] = False
    run(Inputs.model_validate(sections))
    for page in ("results/report.html", "results/report.md"):
        assert "Not run: report.audit is false" in Path(page).read_text()
        assert "sha256 is" not in Path(page).read_text()


def test_the_pages_being_written_are_no_finding(made: Path) -> None:
    outs = "".join(f"    - {{path: {page}, md5: {'0' * 32}}}\n" for page in REPORT_PAGES)
    Path("dvc.lock").write_text(f"stages:\n  report:\n    outs:\n{outs}")
    REPORT_PAGES[0].write_text("of the run before")
    assert len(audit_workspace(Path(), []).findings) == 2
    assert audit_workspace(Path(), REPORT_PAGES).findings == []


def test_params_versions_and_costs_are_on_both_pages(made: Path) -> None:
    edit_manifest(made, "data/queries", params={"sample": 4242})
    params = "collect: {seed: 7}  # ``` <b>\n"
    content = content_of(params=params)
    html, markdown = render_html(content), render_markdown(content)
    assert "collect: {seed: 7}  # ``` &lt;b&gt;" in html
    assert "````yaml\ncollect: {seed: 7}  # ``` <b>\n````" in markdown
    for page in (html, markdown):
        assert "sample: 4242" in page
        assert "no GPU, 2 cores, 6.0 GiB; Python not recorded; source abc1234; torch 2.13.0" in page
        assert "8 min 40 s" in page  # eight records of 65 seconds
        assert content.provenance[0].digest in page


def test_columns_that_an_artifact_does_not_have_are_left_out(made: Path) -> None:
    shutil.rmtree("results/probe/interpret")
    rows = [{"query": "q", "cosine_embedding": 0.25, "vocabulary": [[{"word": " law", "probability": 0.5}]]}]
    with create(Path("results/probe/interpret"), kind="probe", params={}) as out:
        out.write_table("rows.parquet", pa.Table.from_pylist(rows))
    (sample,) = content_of().samples
    assert (sample.decoded, sample.faithfulness, sample.to_embedding, sample.vocabulary) == ("", None, 0.25, ["law"])
    assert "to the embedding 0.250" in render_html(content_of())
