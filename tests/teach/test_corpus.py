"""Which texts are read, and in which order."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core.artifacts import create, open_artifact
from pipeline.core.errors import SourceError
from pipeline.core.readers import LocalSource
from pipeline.core.schemas import QUERIES, RESPONSES
from pipeline.core.sources import SourceDigests
from pipeline.embed.teachers.template import TemplateTokenizer
from pipeline.teach.corpus import corpus_texts, hash_ordered, tokenize_corpus
from pipeline.teach.mntp import maskable
from pipeline.teach.params import Corpus
from tests.conftest import tiny_tokenizer


def write_artifacts() -> None:
    queries = [{"id": name, "text": f"query {name}", "source": "t"} for name in "abcd"]
    with create(Path("data/queries"), kind="queries", params={}) as out:
        out.write_table("train.parquet", pa.Table.from_pylist(queries[:3], QUERIES))
        out.write_table("heldout.parquet", pa.Table.from_pylist(queries[3:], QUERIES))
    facts = {"prompt_tokens": 1, "response_tokens": 1}
    answers = [{"id": q["id"], "response": f"answer {q['id']}", "finish_reason": "stop", **facts} for q in queries]
    answers[1] |= {"response": "half an", "finish_reason": "error", "error": "why"}
    with create(Path("data/responses"), kind="responses", params={}) as out:
        out.write_parts([pa.Table.from_pylist(answers, RESPONSES)], RESPONSES)


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ("queries", {"query a", "query b", "query c"}),
        ("responses", {"answer a", "answer c"}),
        ("both", {"query a", "query b", "query c", "answer a", "answer c"}),
        ("sources", {"one", "two"}),
    ],
)
def test_held_out_and_failed_rows_are_not_read(corpus: Corpus, expected: set[str], workspace: Path) -> None:
    write_artifacts()
    Path("lines.txt").write_text("one\ntwo\n")
    artifacts = (open_artifact(Path("data/queries"), "queries"), open_artifact(Path("data/responses"), "responses"))
    sources = [LocalSource(kind="local", path="lines.txt")]
    assert {text.strip() for text in corpus_texts(corpus, *artifacts, sources, SourceDigests(workspace))} == expected


def test_a_source_that_is_missing(workspace: Path) -> None:
    write_artifacts()
    artifacts = (open_artifact(Path("data/queries"), "queries"), open_artifact(Path("data/responses"), "responses"))
    with pytest.raises(SourceError, match=r"no\.txt does not exist"):
        list(corpus_texts("sources", *artifacts, [LocalSource(kind="local", path="no.txt")], SourceDigests(workspace)))


def test_the_order_is_the_texts_own() -> None:
    texts = [f"text {index}" for index in range(50)]
    ordered = hash_ordered([*texts, " text 7\n", "", "  "])
    assert sorted(ordered) == sorted(texts)
    assert ordered == hash_ordered(reversed(texts))
    assert ordered != sorted(texts)
    assert [text for text in ordered if text != "text 9"] == hash_ordered(text for text in texts if text != "text 9")


def test_no_more_is_read_than_is_wanted() -> None:
    tokenizer = TemplateTokenizer(tiny_tokenizer(), max_tokens=8)
    texts = ["x", "same beginning one", "same beginning two", *(f"{index} text" for index in range(20))]
    found = tokenize_corpus(texts, tokenizer, lambda row: bool(maskable(row)), most=5, batch_size=2, phase="mntp")
    assert (len(found.rows), found.short) == (5, 1)
    assert [len(row.ids) for row in found.rows] == [8, 6, 6, 6, 6]
