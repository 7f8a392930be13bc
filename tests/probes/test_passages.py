from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.probes.passages as passages
from pipeline.errors import EvaluationError, ParamsError
from pipeline.params import validate
from pipeline.probes.passages import SourceParams, load_judged, load_passages, search
from tests.evaluation_fakes import VectorSystem, WordSystem, retrieval_folder, sts_folder


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
    with pytest.raises(EvaluationError, match="1 embeddings are not finite"):
        search(system, np.array([[1.0, 0.0]]), ["near", "bad"], "", 2)


def test_passages_get_their_instruction() -> None:
    system = WordSystem()
    search(system, np.eye(8, dtype=np.float32), ["apple pie"], "Summarize:", 1)
    assert system.calls == [("Summarize:", ["apple pie"])]


@pytest.mark.parametrize("entry", [{}, {"local": "a", "dataset": "b/c"}])
def test_a_source_is_in_one_place(entry: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="exactly one of local and dataset"):
        validate(entry, SourceParams, where="params.yaml")


def test_a_local_source_must_have_the_layout(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "r")
    sts_folder(tmp_path / "s")
    assert load_passages(SourceParams(local="r"), tmp_path)["title"][0].as_py() == "apple"
    for load in (load_judged, load_passages):
        with pytest.raises(EvaluationError, match=r"retrieval layout|config 'corpus' missing"):
            load(SourceParams(local="s"), tmp_path)


def test_a_hub_source_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="data set 'no-one/nothing' cannot be loaded: "):
        load_judged(SourceParams(dataset="no-one/nothing", revision="main"), tmp_path)
