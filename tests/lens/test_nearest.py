"""The nearest known texts, exactly, however they are chunked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pipeline.core.vectors as ranking
import pipeline.lens.nearest as lens_nearest
from pipeline.core.errors import ArtifactError, SourceError
from pipeline.core.files import write_parquet
from pipeline.core.vectors import top_k
from pipeline.encoder.embedded_by import EMBEDDED_BY, made_by
from pipeline.lens.nearest import index_of_targets, nearest, open_index
from tests.probe.test_alignment import write_heldout


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("block", [2, 1024])
def test_top_k_is_the_full_sort_in_any_chunks(chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "BLOCK", block)
    random = np.random.default_rng(0)
    queries, corpus = random.normal(size=(5, 4)), random.normal(size=(20, 4)) * 9
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, corpus)]
    cosines = unit[0] @ unit[1].T
    rows, found = top_k(queries, (corpus[start : start + chunk] for start in range(0, 20, chunk)), 6)
    np.testing.assert_array_equal(rows, np.argsort(-cosines, axis=1)[:, :6])
    np.testing.assert_allclose(found, -np.sort(-cosines, axis=1)[:, :6], atol=1e-6)


def test_of_equal_vectors_the_first_comes_first_and_a_small_corpus_gives_what_it_has() -> None:
    chunks = [np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 0.0]]), np.zeros((0, 2)), np.array([[3.0, 0.0]])]
    rows, cosines = top_k(np.array([[5.0, 0.0]]), iter(chunks), 10)
    assert rows.tolist() == [[1, 2, 3, 0]]
    assert cosines.tolist() == [[1, 1, 1, 0]]
    assert top_k(np.array([[5.0, 0.0]]), iter(chunks), 2)[0].tolist() == [[1, 2]]
    assert top_k(np.zeros((0, 2)), iter(chunks), 2)[0].shape == (0, 0)


def test_targets_are_an_index_of_responses(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heldout(width=4)
    monkeypatch.setattr(lens_nearest, "CHUNK_ROWS", 2)
    index = open_index(Path("data"))
    assert (index.rows, index.width) == (3, 4)
    [first, second] = nearest(np.array([[0.1, 3.0, 0.2, 0], [1.0, 0, 0, 0]]), index, 2)
    assert [(near.id, near.text) for near in first] == [("1", "bread"), ("2", "cloud")]
    assert abs(first[0].cosine - 3 / np.sqrt(9.05)) < 1e-6
    assert second[0][1:] == (1.0, "apple")


def test_only_some_responses_may_count(workspace: Path) -> None:
    from pipeline.core.artifacts import open_artifact

    write_heldout(width=4)
    targets, responses = (open_artifact(Path("data") / kind, kind) for kind in ("targets", "responses"))
    some = index_of_targets(targets, responses, ["0", "2"])
    assert some.rows == 2
    [row] = nearest(np.array([[0.0, 1.0, 0.5, 0]]), some, 5)
    assert [near.text for near in row] == ["cloud", "apple"]
    assert some.version != index_of_targets(targets, responses).version


def write_embedded(path: Path, texts: list[str], vectors: list[list[float]], encoder: Any = None) -> None:
    """As `encode` writes a corpus, as if by `encoder`."""
    kind = pa.list_(pa.float32(), len(vectors[0]))
    origin = None if encoder is None else {EMBEDDED_BY: json.dumps(made_by(encoder, "any"))}
    schema = pa.schema([("text", pa.string()), ("embedding", kind)], origin)
    write_parquet(pa.table({"text": texts, "embedding": vectors}, schema=schema), path)


def test_what_encode_wrote_is_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens_nearest, "CHUNK_ROWS", 1)
    write_embedded(tmp_path / "c.parquet", ["up", "right"], [[0, 2], [1, 0]])
    [row] = nearest(np.array([[3.0, 4.0]]), open_index(tmp_path / "c.parquet"), 5)
    assert [(near.id, near.text) for near in row] == [("0", "up"), ("1", "right")]
    np.testing.assert_allclose([near.cosine for near in row], [0.8, 0.6], atol=1e-6)


def test_a_corpus_that_is_none(tmp_path: Path) -> None:
    write_embedded(tmp_path / "c.parquet", ["x"], [[0, 2]])
    with pytest.raises(SourceError, match="vectors of 2 dimensions, the encoder's have 3"):
        nearest(np.ones((1, 3)), open_index(tmp_path / "c.parquet"), 1)
    for wrong in ([[0, 2], None], [[0, 2], [0, float("nan")]]):
        write_embedded(tmp_path / "joined.parquet", ["x", "y"], wrong)  # type: ignore[arg-type]
        with pytest.raises(SourceError, match="a row of 'embedding' is not 2 finite numbers"):
            nearest(np.ones((1, 2)), open_index(tmp_path / "joined.parquet"), 1)
    write_parquet(pa.table({"text": ["x"]}), tmp_path / "plain.parquet")
    with pytest.raises(SourceError, match=r"needs the columns 'text' and 'embedding'.*its columns: text"):
        open_index(tmp_path / "plain.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name, what in {"torn.parquet": "cannot be read", "gone.parquet": "does not exist"}.items():
        with pytest.raises(SourceError, match=f"corpus: .*{name} {what}"):
            open_index(tmp_path / name)
    with pytest.raises(ArtifactError):
        open_index(tmp_path)
