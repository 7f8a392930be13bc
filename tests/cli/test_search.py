"""Search: ranks in closed form, corpora in every state."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pipeline.cli.search as searching
from pipeline.__main__ import app
from pipeline.cli.search import Hit, search, table
from pipeline.core.errors import SourceError
from pipeline.core.readers import open_texts
from pipeline.encoder.embedded_by import EMBEDDED_BY, center_facts
from pipeline.encoder.encode_file import encode_file
from pipeline.encoder.inference import Embedded
from tests.encoder.test_encode_file import LengthEncoder, expected, reading


@pytest.mark.parametrize("embedded", [False, True])
def test_the_nearest_by_cosine_over_chunks(workspace: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool) -> None:
    monkeypatch.setattr(searching, "CHUNK_ROWS", 2)
    texts = ["bbbb", "a", "bb", "zz", "bb"]
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts))
    if embedded:
        encode_file(LengthEncoder(), open_texts(Path("in.txt")), Path("c.parquet"))  # type: ignore[arg-type]
    corpus, encoder = open_texts(Path("c.parquet" if embedded else "in.txt")), LengthEncoder()
    found = search(encoder, corpus, "bb", count=3)  # type: ignore[arg-type]
    assert [(hit.row, hit.text) for hit in found] == [(2, "bb"), (4, "bb"), (3, "zz")]
    first, other = expected(["bb", "zz"])
    cosine = first @ other / np.linalg.norm(first) / np.linalg.norm(other)
    np.testing.assert_allclose([hit.score for hit in found], [1.0, 1.0, cosine], atol=1e-6)
    assert [len(call) for call in encoder.calls] == ([1] if embedded else [1, 2, 2, 1])
    assert len(search(encoder, corpus, "bb", count=50)) == 5  # type: ignore[arg-type]


def test_an_embedding_of_nothing_is_like_nothing(workspace: Path) -> None:
    class Nothing(LengthEncoder):
        def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
            return Embedded(super().embed(texts, **options).vectors * (len(texts) == 1), 0)

    Path("in.txt").write_text("zero\nzero\n")
    assert search(Nothing(), open_texts(Path("in.txt")), "q", count=1) == [Hit(0, 0.0, "zero")]  # type: ignore[arg-type]


def test_a_corpus_that_changes_meanwhile(workspace: Path) -> None:
    class Careless(LengthEncoder):
        def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
            if len(texts) > 1:
                Path("in.txt").write_text("a\n")
            return super().embed(texts, **options)

    Path("in.txt").write_text("a\nbb\n")
    with pytest.raises(SourceError, match=r"in\.txt changed while it was searched"):
        search(Careless(), open_texts(Path("in.txt")), "bb")  # type: ignore[arg-type]


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
    assert "holds embeddings with another instruction: its texts are embedded now" in caplog.text


@pytest.mark.parametrize("form", ["in.txt", "plain.parquet", "centred.parquet"])
def test_centring_changes_who_is_nearest(workspace: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(searching, "CHUNK_ROWS", 2)
    texts = ["a", "bbbbbb", "b"]  # 1 97 1, 6 98 1, 1 98 1: their mean is 8/3 293/3 1
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts))
    for output, center in (("plain.parquet", None), ("centred.parquet", "corpus")):
        encode_file(LengthEncoder(), open_texts(Path("in.txt")), Path(output), center=center)  # type: ignore[arg-type]
    corpus, encoder = open_texts(Path(form)), LengthEncoder()
    # "bbbb" is 4 98 1: less the mean 4/3 1/3 0, as the second text 10/3 1/3 0 and not as the first, -5/3 -2/3 0.
    found = search(encoder, corpus, "bbbb", center="corpus")  # type: ignore[arg-type]
    assert [hit.text for hit in found] == ["bbbbbb", "b", "a"]
    cosine = (4 * 10 + 1) / np.sqrt((4 * 4 + 1) * (10 * 10 + 1))
    assert found[0].score == pytest.approx(cosine, abs=1e-4)
    assert found[2].score == pytest.approx(-(4 * 5 + 2) / np.sqrt(17 * 29), abs=1e-4)
    assert len([call for call in encoder.calls if call != ["bbbb"]]) == (2 if form == "in.txt" else 0)
    by_file = search(encoder, corpus, "bbbb", center="centred.parquet")  # type: ignore[arg-type]
    np.testing.assert_allclose([hit.score for hit in by_file], [hit.score for hit in found], atol=1e-4)
    plain = search(encoder, corpus, "bbbb", count=3)  # type: ignore[arg-type]
    assert min(hit.score for hit in plain) > 0.99


@pytest.mark.parametrize("other", ["encoder", "instruction"])
def test_a_mean_of_other_embeddings_is_not_subtracted(workspace: Path, other: str) -> None:
    Path("in.txt").write_text("a\nbbbbbb\nb\n")
    maker = reading({"max_query_tokens": 8}) if other == "encoder" else LengthEncoder()
    instruction = "" if other == "encoder" else "a long instruction"
    encode_file(maker, open_texts(Path("in.txt")), Path("c.parquet"), instruction=instruction, center="corpus")
    if other == "encoder":  # whose mean is another one
        table = pq.read_table("c.parquet")
        said = json.loads(table.schema.metadata[EMBEDDED_BY]) | center_facts(np.array([9, 9, 9], np.float32))
        pq.write_table(table.replace_schema_metadata({EMBEDDED_BY: json.dumps(said)}), "c.parquet")
    found = search(LengthEncoder(), open_texts(Path("c.parquet")), "bbbb", center="corpus")  # type: ignore[arg-type]
    # As of the texts themselves: see test_centring_changes_who_is_nearest.
    assert [hit.text for hit in found] == ["bbbbbb", "b", "a"]
    assert found[0].score == pytest.approx((4 * 10 + 1) / np.sqrt((4 * 4 + 1) * (10 * 10 + 1)), abs=1e-4)


@pytest.mark.parametrize("wrong", [None, [1.0, 2.0], [1.0, float("nan"), 1.0]])
def test_a_row_that_is_no_embedding_is_an_error_and_no_passage(workspace: Path, wrong: list[float] | None) -> None:
    """As after the join of two tables."""
    Path("in.txt").write_text("a\nbb\n")
    encode_file(LengthEncoder(), open_texts(Path("in.txt")), Path("c.parquet"))  # type: ignore[arg-type]
    table = pq.read_table("c.parquet")
    joined = pa.table({"text": ["a", "bb"], "embedding": [[1.0, 97.0, 1.0], wrong]})
    pq.write_table(joined.replace_schema_metadata(table.schema.metadata), "c.parquet")
    with pytest.raises(SourceError, match=r"corpus: c\.parquet: a row of 'embedding' is not 3 finite numbers"):
        search(LengthEncoder(), open_texts(Path("c.parquet")), "bb")  # type: ignore[arg-type]


def test_embeddings_of_untidy_texts_are_not_those_of_tidy_ones(workspace: Path) -> None:
    for name, text in (("tidy", "a b"), ("untidy", "a    b")):
        Path("in.txt").write_text(f"{text}\ncc\n")
        encode_file(LengthEncoder(), open_texts(Path("in.txt")), Path(f"{name}.parquet"))  # type: ignore[arg-type]
    for name, embedded in (("tidy", []), ("untidy", [["a b", "cc"]])):
        encoder = LengthEncoder()
        found = search(encoder, open_texts(Path(f"{name}.parquet"), tidy=True), "a b")  # type: ignore[arg-type]
        assert (found[0].text, found[0].score) == ("a b", pytest.approx(1.0))
        assert encoder.calls == [["a b"], *embedded]


@pytest.mark.parametrize("center", [None, "corpus"])
@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"encoder": {}}', b'{"encoder": {}, "center": {}}'])
def test_a_corpus_with_damaged_metadata_is_embedded(
    workspace: Path, caplog: pytest.LogCaptureFixture, metadata: bytes, center: str | None
) -> None:
    table = pa.table({"text": ["a", "bb"], "embedding": [[1.0], [2.0]]})
    pq.write_table(table.replace_schema_metadata({EMBEDDED_BY: metadata}), "c.parquet")
    encoder = LengthEncoder()
    with caplog.at_level(logging.INFO):
        assert search(encoder, open_texts(Path("c.parquet")), "bb", center=center)[0].text == "bb"  # type: ignore[arg-type]
    assert encoder.calls == [["bb"], ["a", "bb"]]
    assert "does not say what made its embeddings" in caplog.text


def test_a_corpus_of_an_encoder_that_reads_otherwise_is_embedded_again(workspace: Path) -> None:
    Path("in.txt").write_text("a\nbb\n")
    encode_file(reading({"max_query_tokens": 8}), open_texts(Path("in.txt")), Path("c.parquet"))
    encoder = LengthEncoder()
    search(encoder, open_texts(Path("c.parquet")), "bb")  # type: ignore[arg-type]
    assert encoder.calls == [["bb"], ["a", "bb"]]


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


def test_no_passage_commands_the_terminal() -> None:
    from rich.console import Console

    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(table([Hit(0, 0.5, "safe\x1b[2J\x07\u202etext")]))
    assert "safe[2Jtext" in capture.get()
    assert not set(capture.get()) & set("\x1b\x07\u202e")


@pytest.fixture
def model(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    from tests.export.test_merged import write_model

    return write_model(tiny_backbone("llama"), compression_tokens=2)


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
        (
            ("--model", "gone/enc--v2", "--corpus", "c.txt", "q"),
            "error: there is no folder 'gone/enc--v2' here, and it is no name of the hub's: Cannot have -- or ..",
        ),
    ]:
        code, _, stderr = call("search", *arguments)
        assert code == 1
        assert stderr.splitlines()[-1].startswith(message)
