"""Cosines of pairs and of shuffled pairs, by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import EvaluationError
from pipeline.lens.faithfulness import check_teacher, over_chance, pair, summary
from pipeline.lens.reading import ROWS, add_cosines, pair_cosines, summaries
from tests.evaluate.fakes import VectorSystem

SETTINGS = BootstrapParams(resamples=500)


def test_chance_is_the_mean_of_all_other_pairs() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(6, 3)) * 5, random.normal(size=(6, 3))
    cosines = (first @ second.T) / np.outer(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))
    found = pair(first, second)
    np.testing.assert_allclose(found.own, np.diag(cosines), atol=1e-6)
    others = [np.delete(cosines[row], row).mean() for row in range(6)]
    np.testing.assert_allclose(found.chance, others, atol=1e-6)


def test_a_decoder_that_says_one_thing_is_at_chance() -> None:
    """However near its text is to every answer: it says nothing of its own."""
    second = np.array([[1.0, 0.1], [1.0, 0.2], [1.0, -0.1], [1.0, 0.0]])
    constant = summary("m", pair(np.ones((4, 2)), second), SETTINGS)
    assert constant.mean > 0.7
    assert constant.chance == pytest.approx(constant.mean, abs=1e-6)
    delta = over_chance("m", pair(np.ones((4, 2)), second), SETTINGS)
    assert delta is not None
    assert delta.verdict == "within noise"


def test_a_faithful_decoder_is_above_chance() -> None:
    vectors = np.eye(40)
    found = summary("m", pair(vectors, vectors), SETTINGS)
    assert found == (1.0, 1.0, 1.0, 0.0)
    delta = over_chance("m", pair(vectors, vectors), SETTINGS)
    assert delta is not None
    assert (delta.delta, delta.verdict) == (1.0, "better")


def test_the_interval_holds_the_mean_of_noisy_pairs() -> None:
    random = np.random.default_rng(1)
    first = random.normal(size=(50, 8))
    found = summary("m", pair(first, first + random.normal(size=(50, 8))), SETTINGS)
    assert found.low is not None and found.high is not None
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.2


def test_one_pair_has_no_chance() -> None:
    one = pair(np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]]))
    assert summary("m", one, SETTINGS) == (1.0, None, None, None)
    assert over_chance("m", one, SETTINGS) is None


def test_a_pair_without_a_chance_leaves_the_others_theirs() -> None:
    """Files are read in chunks: the last one may have a single row, which there is nothing to shuffle with."""
    vectors = np.eye(65)
    teacher = VectorSystem({str(row): vectors[row].tolist() for row in range(65)})
    texts = [str(row) for row in range(65)]
    parts = [
        add_cosines(rows(texts[at], texts[at]), vectors[at], lambda some: teacher.encode(some, ""))
        for at in (slice(0, 64), slice(64, 65))
    ]
    together = pa.concat_tables(parts)
    assert summaries(together, SETTINGS) == dict.fromkeys(("embedding", "response"), (1.0, 1.0, 1.0, 0.0))
    pairs = pair_cosines(together)["response"]
    assert (len(pairs.own), int(np.isnan(pairs.chance).sum())) == (65, 1)
    delta = over_chance("m", pairs, SETTINGS)
    assert delta is not None
    assert (delta.delta, delta.verdict, delta.units) == (1.0, "better", 64)


def test_a_zero_vector_is_at_cosine_zero() -> None:
    found = pair(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert found.own.tolist() == [0, 1]


def rows(decoded: Sequence[str], responses: Sequence[str | None]) -> pa.Table:
    content = {"id": [str(row) for row in range(len(decoded))], "decoded": decoded, "response": responses}
    return pa.table({name: content.get(name, [None] * len(decoded)) for name in ROWS.names}, schema=ROWS)


def test_only_rows_with_a_response_are_compared_with_one() -> None:
    teacher = VectorSystem({"a": [1, 0], "b": [1, 1], "": [0, 1]})
    found = add_cosines(
        rows(["a", "b", "a"], ["a", None, ""]), np.eye(3)[:, :2], lambda texts: teacher.encode(texts, "")
    )
    np.testing.assert_allclose(found["cosine_embedding"].to_pylist(), [1, 0.5**0.5, 0], atol=1e-6)
    assert found["cosine_response"].to_pylist() == [1.0, None, 0.0]
    assert found["chance_response"].to_pylist() == [0.0, None, 1.0]
    assert set(summaries(found, SETTINGS)) == {"embedding", "response"}
    without = add_cosines(rows(["a", "b"], [None, None]), np.eye(2), lambda texts: teacher.encode(texts, ""))
    assert set(summaries(without, SETTINGS)) == {"embedding"}


def test_a_teacher_of_another_width_is_refused() -> None:
    teacher = VectorSystem({"a": [1, 0]})
    with pytest.raises(EvaluationError, match="2 dimensions, the encoder was trained for one of 5"):
        add_cosines(rows(["a"], ["a"]), np.ones((1, 5)), lambda texts: teacher.encode(texts, ""))


HUB = {"name": "org/t", "revision": "a", "kind": "llm2vec", "dtype": "float32", "adapters": [{"name": "org/a"}]}
FOLDER = {"name": "models/t", "sha256": "a", "kind": "sentence-transformers", "prompt": ""}


@pytest.mark.parametrize(
    ("recorded", "change", "key"),
    [
        (HUB, {"revision": "b"}, "revision"),
        (HUB, {"name": "org/u"}, "name"),
        (HUB, {"adapters": [{"name": "org/b"}]}, "adapters"),
        (HUB, {"max_tokens": 8}, "max_tokens"),
        (FOLDER, {"sha256": "b"}, "sha256"),
        (FOLDER, {"prompt": "passage: "}, "prompt"),
    ],
)
def test_another_teacher_of_the_same_width_is_refused(
    recorded: dict[str, Any], change: dict[str, Any], key: str
) -> None:
    with pytest.raises(EvaluationError, match=f"another teacher than that of the encoder: its {key} is"):
        check_teacher({**recorded, **change}, recorded, "the encoder")


def test_the_recorded_teacher_may_lie_elsewhere_and_go_on_by_a_transform(caplog: pytest.LogCaptureFixture) -> None:
    check_teacher(HUB, HUB, "the encoder")
    check_teacher({**FOLDER, "name": "/elsewhere", "transform": {"kind": "center"}}, FOLDER, "the encoder")
    adapted = [{**HUB, "adapters": [{"name": name, "sha256": "a"}]} for name in ("here", "there")]
    check_teacher(*adapted, "the encoder")
    assert not caplog.messages


@pytest.mark.parametrize("recorded", [{}, {"name": "org/theirs"}])
def test_where_nothing_pins_the_teacher_a_warning_says_so(
    recorded: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_teacher(HUB, recorded, "the encoder")
    assert "cannot tell whether teacher org/t is the one of the encoder" in caplog.text
