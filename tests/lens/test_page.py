"""The page of rows in a real browser: quiet, nothing fetched, nothing too wide, readable in both schemes."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.lens.batch import render_page
from pipeline.lens.faithfulness import Summary
from pipeline.lens.reading import ROWS
from tests.report.browser import Browser
from tests.report.test_page import CONTRASTS, OVERFLOW

LONG = "word" * 100


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A row with everything, one with long words, one of which only the decoded text is known."""
    words = [[{"word": " the", "probability": 0.25}, {"word": LONG, "probability": 0.5}]] * 10
    near = [{"id": "1", "cosine": 0.5, "text": text} for text in ("a known text", LONG)]
    cosines = {"cosine_embedding": 0.5, "cosine_response": 0.25, "chance_embedding": 0.0, "chance_response": 0.0}
    full = {"id": "a", "query": "A query?", "response": "An answer. " * 40, "decoded": "A text."}
    rows = [
        {**full, **cosines, "vocabulary": words, "nearest": near},
        {**full, **cosines, "query": LONG, "decoded": LONG, "vocabulary": words, "nearest": near},
        {"id": "b", "decoded": "Only this."},
    ]
    table = pa.Table.from_pylist(rows, schema=ROWS)
    found = {"embedding": Summary(0.5, 0.25, 0.75, 0.0), "response": Summary(0.25, None, None, None)}
    file = tmp_path / "page.html"
    file.write_text(render_page(table, 3, found, "What the embeddings hold"), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_quiet(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.problems() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.evaluate(OVERFLOW) <= 0
    faint = [text for text in browser.evaluate(CONTRASTS) if text[0] < 4.5]
    assert faint == []
    image = page.with_suffix(".png")
    browser.screenshot(image)
    assert image.stat().st_size > 10_000
