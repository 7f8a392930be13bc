"""Standardised systems, on readings that are known by hand."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from pipeline.core.artifacts import open_artifact
from pipeline.core.errors import EvaluationError
from pipeline.core.target_transform import DECORRELATE, STANDARDIZE
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.standardized import StandardizedSystem, standardization_bytes, training_texts
from pipeline.evaluate.system import innermost, revision_of
from tests.evaluate.fakes import VectorSystem
from tests.stage_runs import write_queries

READINGS = {"a": [1.0, 10.0, 5.0], "b": [3.0, 30.0, 5.0], "c": [5.0, 0.0, 5.0]}


def fitted(texts: list[str] = ["a", "b"]) -> StandardizedSystem:  # noqa: B006
    return StandardizedSystem.fitted("echo-standardized", VectorSystem(READINGS, "echo"), texts, STANDARDIZE)


def test_each_dimension_is_over_its_mean_and_deviation_of_the_training_texts() -> None:
    system = fitted()
    # Means 2, 20, 5 and deviations 1, 10, 0: what does not vary says nothing.
    np.testing.assert_allclose(system.encode(["c", "a"], ""), [[3, -2, 0], [-1, -1, 0]], atol=1e-6)
    assert system.prompting == "none; standardised over training queries"
    assert innermost(system).name == "echo"


def test_decorrelated_readings_share_half_of_their_correlation_less_what_is_held_back() -> None:
    # Of the correlation .6 three tenths are held back: 1.6 and .4 are divided by the roots of 1.42 and .58.
    rows = [[1, 1], [-1, -1]] * 8 + [[1, -1], [-1, 1]] * 2
    texts = {str(at): [float(value) for value in row] for at, row in enumerate(rows)}
    vectors = VectorSystem(texts, "echo")
    system = StandardizedSystem.fitted("echo-decorrelated", vectors, list(texts), DECORRELATE)
    large, small = 1.6 / 1.42**0.5, 0.4 / 0.58**0.5
    found = np.cov(system.encode(list(texts), "").T, bias=True)
    expected = (large - small) / (large + small)
    np.testing.assert_allclose(found, [[1, expected], [expected, 1]], atol=1e-5)
    assert system.prompting == "none; decorrelated over training queries"


def test_other_training_texts_are_another_system() -> None:
    assert revision_of(fitted()) == revision_of(fitted())
    assert (
        len({revision_of(fitted()), revision_of(fitted(["a", "c"])), revision_of(VectorSystem(READINGS, "echo"))}) == 3
    )


def test_one_text_is_too_few() -> None:
    with pytest.raises(EvaluationError, match=r"echo-standardized: .* 1 training queries"):
        fitted(["a"])


def test_what_was_fitted_is_stored_by_system() -> None:
    found = load(standardization_bytes({"echo-standardized": fitted().transform}))
    assert {name: value.tolist() for name, value in found.items()} == {
        "echo-standardized.mean": [2, 20, 5],
        "echo-standardized.scale": [1, pytest.approx(0.1), 0],
    }


def test_raw_and_standardised_readings_share_the_embeddings_of_a_cache(workspace: Path) -> None:
    raw = CachedSystem(VectorSystem(READINGS, "echo"), Path("embeddings"), dtype="float32")
    raw.encode(["a", "b", "c"], "")
    raw.close()
    again = CachedSystem(VectorSystem(READINGS, "echo"), Path("embeddings"), dtype="float32")
    StandardizedSystem.fitted("echo-standardized", again, ["a", "b"], STANDARDIZE).encode(["c"], "")
    again.close()
    assert (again.reused, again.computed) == (3, 0)


def test_training_texts_are_the_first_by_id(workspace: Path) -> None:
    write_queries(["one", "two", "three"])
    queries = open_artifact(Path("data/queries"), "queries")
    table = queries.read("train.parquet")
    assert table["id"].to_pylist() == sorted(table["id"].to_pylist())
    assert training_texts(queries) == table["text"].to_pylist()
