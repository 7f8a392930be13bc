"""The page in a real browser: no complaints, nothing fetched, nothing too wide, readable in every scheme."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import write_json
from pipeline.report.render import render_html
from pipeline.report.sections import audit_workspace
from tests.report.browser import OVERFLOW, TOO_WIDE, Browser
from tests.report.toy_results import RECORD, SUITE, SYSTEMS, content_of
from tests.toy_workspace import write_manifest

WIDTHS = [390, 1280]
PRINTED = 718  # A4 between a browser's margins
LONG = "a-task-" + "whose-name-is-long-" * 6

# Each text with its contrast to what is behind it; WCAG AA asks for 4.5.
CONTRASTS = """
(() => {
  const parts = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor, alpha = parts(colour)[3];
      if (alpha === undefined || alpha > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = [...document.body.querySelectorAll('*:not(style)')].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
  return texts.map(element => {
    const style = getComputedStyle(element), ink = element.ownerSVGElement ? style.fill : style.color;
    const [high, low] = [light(ink), light(behind(element))].sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), ink, behind(element), element.textContent.trim().slice(0, 40)];
  });
})()
"""


@pytest.fixture
def page(judged: Path) -> Path:
    """A page with every section, a name that is too long for a phone, and a stage that is out of date."""
    metrics = SUITE | {f"student/{LONG}": 0.5, f"teacher/{LONG}": 0.25}
    wide = {"metric": LONG, "system": "teacher", "delta": 0.25, "low": 0.125, "high": 0.5, "verdict": "better"}
    systems = SYSTEMS | {f"baseline-{number}": {"prompting": "bare text"} for number in range(6)}
    metrics |= {f"baseline-{number}/Facts": 0.1 for number in range(6)}
    write_json(Path("results/evaluate/demo.json"), {"metrics": metrics, "systems": systems, "deltas": [wide], **RECORD})
    edited = Path("data/responses/manifest.json")
    write_manifest(edited, {**json.loads(edited.read_text()), "params": {"changed": True}})
    params = f"report:\n  title: Toy  # {'long ' * 80}\n"
    file = Path("report.html")
    file.write_text(render_html(content_of(audit=audit_workspace(Path(), []), params=params)), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_is_quiet(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate(OVERFLOW) == 0
    assert browser.problems() == []
    assert browser.requests() == [page.resolve().as_uri()]
    browser.screenshot(Path("page.png"))
    check_drawn(Path("page.png"), width, dark=scheme == "dark")


def check_drawn(path: Path, width: int, *, dark: bool) -> None:
    """The picture is as wide as the window, its corner has the scheme's paper, and it shows ink in most places."""
    from matplotlib.image import imread

    picture = imread(path)[:, :, :3]
    assert width - 20 <= picture.shape[1] <= width  # a scroll bar takes its share
    paper = picture[2, 2]
    assert (paper.mean() < 0.2) if dark else (paper.mean() > 0.95)
    bands = range(0, picture.shape[0] - 200, 200)
    inked = [abs(picture[band : band + 200] - paper).max() > 0.3 for band in bands]
    assert len(inked) > 10
    assert sum(inked) > 0.9 * len(inked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, width=1280, scheme=scheme)
    texts: list[list[Any]] = browser.evaluate(CONTRASTS)
    assert len(texts) > 200
    assert [text for text in texts if text[0] < 4.5] == []
    assert len({text[1] for text in texts}) > 3


def test_print_is_light_and_shows_what_is_folded(browser: Browser, page: Path) -> None:
    browser.open(page, width=PRINTED, scheme="dark")
    shown = "[...document.querySelectorAll('pre')].filter(pre => pre.checkVisibility()).length"
    paper = "getComputedStyle(document.body).backgroundColor"
    folded = browser.evaluate("document.querySelectorAll('details pre').length")
    assert folded > 3
    assert (browser.evaluate(shown), browser.evaluate(paper)) == (0, "rgb(20, 24, 28)")
    browser.scheme("dark", media="print")
    assert (browser.evaluate(shown), browser.evaluate(paper)) == (folded, "rgb(255, 255, 255)")
    assert [text for text in browser.evaluate(CONTRASTS) if text[0] < 4.5] == []
    assert browser.evaluate(OVERFLOW) == 0


def test_a_bad_page_is_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><p style="width: 2000px; color: #999">x</p>'
        '<img src="missing.png"><script>console.error("no")</script>'
    )
    browser.open(bad, width=390)
    assert len(browser.evaluate(TOO_WIDE)) == 1
    assert browser.evaluate(OVERFLOW) > 1000
    assert [round(text[0], 1) for text in browser.evaluate(CONTRASTS) if text[3] == "x"] == [2.8]
    assert {event["method"] for event in browser.problems()} >= {"Runtime.consoleAPICalled"}
    assert len(browser.requests()) == 2
