from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import pipeline.probe.passages as passages
from pipeline.core.errors import EvaluationError
from pipeline.probe.passages import cut_documents, passage_texts, search
from pipeline.tasks.local_dataset import LocalData
from pipeline.tasks.local_tasks import RetrievalData, load_retrieval
from tests.evaluate.fakes import VectorSystem, WordSystem


def brute_force(queries: np.ndarray, corpus: np.ndarray, top: int) -> np.ndarray:
    cosines = [[q @ c / np.linalg.norm(q) / np.linalg.norm(c) for c in corpus] for q in queries]
    return np.argsort(-np.array(cosines), axis=1, kind="stable")[:, :top]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(passages, "CHUNK", chunk)
    random = np.random.default_rng(0)
    corpus, queries = random.normal(size=(10, 4)), random.normal(size=(5, 4))
    system = VectorSystem({str(row): list(vector) for row, vector in enumerate(corpus)})
    positions, cosines = search(system, queries, [str(row) for row in range(10)], "", 4)
    assert positions.tolist() == brute_force(queries, corpus, 4).tolist()
    assert (np.diff(cosines, axis=1) <= 0).all() and (np.abs(cosines) <= 1 + 1e-6).all()


def test_length_does_not_count_and_the_earlier_passage_wins_a_tie() -> None:
    system = VectorSystem({"long": [100, 100], "near": [1, 0.1], "twin": [2, 0.2]})
    positions, cosines = search(system, np.array([[3.0, 0.0]]), ["long", "near", "twin"], "", 9)
    assert positions.tolist() == [[1, 2, 0]]
    assert cosines[0, 2] == pytest.approx(np.sqrt(0.5))


def test_a_zero_vector_is_far_and_a_nan_is_refused() -> None:
    system = VectorSystem({"zero": [0, 0], "near": [1, 0], "bad": [np.nan, 0]})
    positions, cosines = search(system, np.array([[1.0, 0.0]]), ["zero", "near"], "", 2)
    assert positions.tolist() == [[1, 0]] and cosines[0, 1] == 0
    with pytest.raises(EvaluationError, match="1 of 2 embeddings are not finite"):
        search(system, np.array([[1.0, 0.0]]), ["near", "bad"], "", 2)


def test_passages_get_their_instruction() -> None:
    system = WordSystem()
    search(system, np.eye(8, dtype=np.float32), ["apple pie"], "Summarize:", 1)
    assert system.calls == [("Summarize:", ["apple pie"])]


def documents(*texts: str, titles: Callable[[int], str] = lambda row: f"t{row}") -> RetrievalData:
    """Documents 0, 1, ..., each relevant to the query of its number."""
    names = [str(row) for row in range(len(texts))]
    corpus = pa.table({"id": names, "title": [titles(row) for row in range(len(texts))], "text": list(texts)})
    return RetrievalData({name: f"ask {name}" for name in names}, corpus, {name: {name: 2} for name in names}, None)


def test_documents_are_cut_as_the_paper_does() -> None:
    data, dropped = cut_documents(documents("a b", "a b  c\nd", "a b c d e", "a"), 2)
    assert data.corpus.to_pylist() == [
        {"id": "0", "title": "t0", "text": "a b"},
        {"id": "1#0", "title": "t1", "text": "a b"},
        {"id": "1#1", "title": "t1", "text": "c d"},
        {"id": "2#0", "title": "t2", "text": "a b"},
        {"id": "2#1", "title": "t2", "text": "c d"},
        {"id": "3", "title": "t3", "text": "a"},
    ]
    assert dropped == 1
    assert data.relevant == {"0": {"0": 2}, "1": {"1#0": 2, "1#1": 2}, "2": {"2#0": 2, "2#1": 2}, "3": {"3": 2}}
    assert list(data.queries) == ["0", "1", "2", "3"]
    again, dropped = cut_documents(data, 2)
    assert again.corpus.equals(data.corpus) and again.relevant == data.relevant and dropped == 0


def test_ids_that_collide_are_refused() -> None:
    data = documents("a b", "c")
    corpus = data.corpus.set_column(0, "id", [["0", "0#1"]])
    with pytest.raises(EvaluationError, match="two passages get one id"):
        cut_documents(RetrievalData(data.queries, corpus, {"0": {"0": 1}}, None), 1)


def test_titles_stand_before_passages() -> None:
    data = documents("one", "two", titles=lambda row: "Title" if row else "")
    assert passage_texts(data.corpus) == ["one", "Title # two"]


@pytest.mark.realdata
def test_the_rule_on_the_authors_documents(real_data: Path) -> None:
    """The real passages keep every tail; put together to documents again and cut by the rule, most tails go."""
    folder = real_data / "hub" / "McGill-NLP" / "AdvBench-IR-chunked"
    if not folder.is_dir():
        pytest.skip("AdvBench-IR is not among the real data")
    whole = load_retrieval(LocalData(folder))
    texts = dict(zip(whole.corpus["id"].to_pylist(), whole.corpus["text"].to_pylist(), strict=True))
    parts = [[texts[name] for name in sorted(scores, key=lambda n: int(n.split("-")[1]))]
             for scores in whole.relevant.values()]  # fmt: skip
    data, dropped = cut_documents(documents(*(" ".join(part) for part in parts)), 100)
    full = sum(len(text.split()) == 100 for text in texts.values())
    only = sum(len(part) == 1 and len(part[0].split()) < 100 for part in parts)
    assert (data.corpus.num_rows, dropped) == (full + only, len(texts) - full - only)
    assert set(data.corpus["text"].to_pylist()) <= {" ".join(text.split()) for text in texts.values()}
    assert len(data.relevant) == 520 and all(data.relevant.values())
