"""The pages of a comparison, through the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.compare.render import short_names
from tests.compare.runs import write_run
from tests.report.browser import OVERFLOW, TOO_WIDE, Browser


def compare(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_each_format_has_scores_intervals_params_and_times(tmp_path: Path) -> None:
    first = str(write_run(tmp_path / "<a>", [0.0, 0.25], params="train: {epochs: 1}\n"))
    other = str(write_run(tmp_path / "b", [0.5, 0.75], params="train: {epochs: 2}\n"))
    markdown = compare(first, other)
    assert "| search | 0.125 | 0.625<br>+0.500 better<br>[+0.500, +0.500] |" in markdown
    assert (
        "| train.epochs | 1 | 2 |" in markdown.replace("\\", "") and "| evaluate demo | 20.0 s | 20.0 s |" in markdown
    )
    page = tmp_path / "runs.html"
    assert compare(first, other, "--output", str(page)).strip() == str(page)
    html = page.read_text(encoding="utf-8")
    assert "&lt;a&gt;" in html and "<a>" not in html and "http" not in html
    record = tmp_path / "runs.json"
    compare(first, other, "--output", str(record))
    cell = json.loads(record.read_text(encoding="utf-8"))["tables"]["suite demo"]["search"][1]
    assert cell["score"] == 0.625 and cell["verdict"] == "better" and cell["low"] == cell["high"] == 0.5


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_four_runs_fits_a_phone_and_a_screen(browser: Browser, tmp_path: Path, width: int) -> None:
    params = "seed: {}\nfrom: [{{path: " + "a-long-path/" * 12 + "{}}}]\n"
    names = ["run-0", "run-1", "run-2", "with-a-long-name-" * 4]
    runs = [
        str(write_run(tmp_path / name, [index / 4, 0.5], ranks=[1, 2], params=params.format(index, index)))
        for index, name in enumerate(names)
    ]
    page = tmp_path / "runs.html"
    compare(*runs, "--output", str(page))
    browser.open(page, width=width)
    assert (browser.evaluate(TOO_WIDE), browser.evaluate(OVERFLOW)) == ([], 0)
    assert (browser.problems(), browser.requests()) == ([], [page.as_uri()])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/runs/a/small", "/runs/a/large"], ["small", "large"]),
        (["runs/a", "runs/b/c"], ["a", "b/c"]),
        (["main", "exp-1"], ["main", "exp-1"]),
        (["runs", "runs/b"], ["runs", "runs/b"]),
    ],
)
def test_columns_are_headed_by_what_differs(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_mistakes_are_one_line_that_names_the_argument(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "a", [0.0, 1.0]))
    for arguments, named in (
        ([run], "RUN"),
        ([run, run], run),
        ([run, str(tmp_path), "--output", "x.pdf"], "--output"),
        ([run, str(tmp_path)], str(tmp_path)),
    ):
        result = CliRunner().invoke(app, ["compare", *arguments])
        assert result.exit_code == 1 and named in result.stderr and result.stderr.count("\n") == 1
