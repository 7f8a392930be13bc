"""Search: ranks in closed form, corpora in every state."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.encoding import encode_file
from pipeline.errors import SourceError
from pipeline.searching import Hit, nearest, search, table
from pipeline.text_files import open_texts
from tests.test_encoding import LengthEncoder


def test_the_nearest_by_cosine_over_chunks() -> None:
    chunks = [
        (["far", "near"], np.array([[0.0, 1.0], [2.0, 0.1]])),
        (["same", "against", "same again"], np.array([[5.0, 0.0], [-1.0, 0.0], [0.5, 0.0]])),
    ]
    found = nearest(np.array([3.0, 0.0]), chunks, 3)
    assert [(hit.row, hit.text) for hit in found] == [(2, "same"), (4, "same again"), (1, "near")]
    np.testing.assert_allclose([hit.score for hit in found], [1.0, 1.0, 2.0 / np.hypot(2.0, 0.1)])
    assert len(nearest(np.array([3.0, 0.0]), chunks, 50)) == 5


def test_an_embedding_of_nothing_is_like_nothing() -> None:
    assert nearest(np.array([1.0, 0.0]), [(["zero"], np.zeros((1, 2)))], 1) == [Hit(0, 0.0, "zero")]


def test_a_corpus_that_encode_wrote_is_not_embedded_again(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("in.txt").write_text("a\nbb\nccc\n")
    encode_file(LengthEncoder(), open_texts(Path("in.txt")), Path("c.parquet"), instruction="D:")  # type: ignore[arg-type]
    corpus, encoder = open_texts(Path("c.parquet")), LengthEncoder()
    with caplog.at_level(logging.INFO):
        first = search(encoder, corpus, "bb", count=2, instruction="D:", document_instruction="D:")  # type: ignore[arg-type]
        assert encoder.calls == [["bb"]]
        assert first[0].text == "bb"
        assert first[0].score == pytest.approx(1.0)
        search(encoder, corpus, "bb", document_instruction="other:")  # type: ignore[arg-type]
        assert encoder.calls[1:] == [["bb"], ["a", "bb", "ccc"]]
    assert "nothing is embedded again" in caplog.text
    assert "by another backbone or instruction: its texts are embedded again" in caplog.text


def test_an_empty_query(workspace: Path) -> None:
    Path("in.txt").write_text("a\n")
    with pytest.raises(SourceError, match="the query is empty"):
        search(LengthEncoder(), open_texts(Path("in.txt")), " \n")  # type: ignore[arg-type]


def test_the_table_cuts_long_passages_and_shows_brackets() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(table([Hit(1234, 0.5, "[bold]x[/bold]"), Hit(0, 0.25, "y" * 1000)]))
    shown = capture.get()
    assert "[bold]x[/bold]" in shown
    assert "1,234" in shown
    assert "0.5000" in shown
    assert shown.count("y") == 300


@pytest.fixture
def model(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    from tests.interop.test_merged import write_model

    return write_model(tiny_backbone("llama"), compression=2)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(model: Path) -> None:
    Path("c.csv").write_text("body\nthe sky is blue\nbread and butter\nthe sky is red\n")
    options = ["--column", "body", "--prompt", "", "--document-prompt", "", "--max-new-tokens", 3]
    code, shown, _ = call("search", "--model", model, "--corpus", "c.csv", "the sky is blue", "-k", 2, *options)
    assert code == 0
    first, second = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in first[1:5]] == ["1", "1.0000", "0", "the sky is blue"]
    assert float(second[2]) < 1
    assert "The query's embedding decodes to: " in shown
    assert call("search", "--model", model, "--corpus", "c.csv", "x", "--column", "body")[0] == 0


def test_mistakes(model: Path) -> None:
    Path("c.txt").write_text("x\n")
    for arguments, message in [
        (("--model", model, "--corpus", "gone.txt", "q"), "error: --corpus: gone.txt does not exist"),
        (("--model", model, "--corpus", "c.txt", " "), "error: the query is empty"),
        (("--model", "none", "--corpus", "c.txt", "q"), "error: none is not an encoder"),
    ]:
        code, _, stderr = call("search", *arguments)
        assert code == 1
        assert stderr.splitlines()[-1].startswith(message)
