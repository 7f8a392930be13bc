"""Reading embeddings of held-out queries, on a tiny backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import EvaluationError
from pipeline.lens import decode
from pipeline.probe.base import ProbeContext
from pipeline.probe.interpret import InterpretParams, run
from tests.encoder.test_inference import make_encoder
from tests.evaluate.fakes import VectorSystem
from tests.probe.fakes import write_heldout

WIDTH = 5  # of `make_encoder`


class Lengths(VectorSystem):
    """Embeds any text, by its length; refuses to after its turn."""

    open = True

    def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
        assert self.open
        return np.array([[len(text) + 1, 1.0, 0, 0, 0][:WIDTH] for text in texts], dtype=np.float32)


class OneEncoder:
    """Systems around one tiny encoder; each is closed after its turn."""

    def encoder(self) -> Any:
        return make_encoder()

    def build(self, names: Any) -> Any:
        for name in names:
            system = Lengths({}, name)
            yield system
            system.open = False


def read(**params: Any) -> Any:
    context = ProbeContext(
        OneEncoder(), ["student"], Path(), Path(), "float32", BootstrapParams(resamples=200)  # type: ignore[arg-type]
    )  # fmt: skip
    return run(InterpretParams(max_new_tokens=3, vocabulary=4, **params), context)


def test_rows_hold_all_that_was_read(workspace: Path) -> None:
    write_heldout(width=WIDTH)
    result = read(queries=2, nearest=2)
    rows = result.rows.to_pylist()
    assert [row["query"] for row in rows] == ["apple what?", "bread what?"]
    assert [row["response"] for row in rows] == ["apple", "bread"]
    assert [row["decoded"] for row in rows] == decode(make_encoder(), ["apple what?", "bread what?"], max_new_tokens=3)
    assert all(len(row["vocabulary"]) == 3 and {len(words) for words in row["vocabulary"]} == {4} for row in rows)
    assert all(0 <= word["probability"] <= 1 for row in rows for token in row["vocabulary"] for word in token)
    assert all(len(row["nearest"]) == 2 for row in rows)
    assert all(row["nearest"][0]["cosine"] >= row["nearest"][1]["cosine"] for row in rows)


def test_nearest_responses_are_by_the_targets(workspace: Path) -> None:
    """Targets are one-hot by row, so the nearest is where the embedding is largest."""
    write_heldout(width=WIDTH)
    [row] = read(queries=1, nearest=1).rows.to_pylist()
    embedding = make_encoder().encode(["apple what?"])[0]
    best = int(embedding[:3].argmax())
    assert row["nearest"][0]["text"] == ("apple", "bread", "cloud")[best]
    assert abs(row["nearest"][0]["cosine"] - embedding[best] / np.linalg.norm(embedding)) < 1e-5


def test_cosines_are_the_teachers_and_stand_beside_chance(workspace: Path) -> None:
    write_heldout(width=WIDTH)
    result = read(queries=3, nearest=0)
    rows = result.rows.to_pylist()
    assert all(row["nearest"] is None for row in rows)
    student = make_encoder().encode([row["query"] for row in rows])
    teacher = Lengths({}, "teacher")
    decoded = teacher.encode([row["decoded"] for row in rows], "")
    responses = teacher.encode([row["response"] for row in rows], "")
    for what, other in (("embedding", student), ("response", responses)):
        cosines = (decoded @ other.T) / np.outer(np.linalg.norm(decoded, axis=1), np.linalg.norm(other, axis=1))
        np.testing.assert_allclose([row[f"cosine_{what}"] for row in rows], np.diag(cosines), atol=1e-5)
        shuffled = (cosines.sum() - np.trace(cosines)) / 6
        assert abs(result.metrics[f"student/cosine_{what}"] - np.diag(cosines).mean()) < 1e-5
        assert abs(result.metrics[f"cosine_{what}/shuffled_pairs"] - shuffled) < 1e-5
        low, high = (result.metrics[f"cosine_{what}/interval_{end}"] for end in ("low", "high"))
        assert low <= result.metrics[f"student/cosine_{what}"] + 1e-6
        assert high >= result.metrics[f"student/cosine_{what}"] - 1e-6
    assert [(delta.metric, delta.system) for delta in result.deltas] == [
        ("cosine_embedding", "chance"),
        ("cosine_response", "chance"),
    ]
    assert result.metrics["queries"] == 3


def test_one_query_has_no_chance_and_no_interval(workspace: Path) -> None:
    write_heldout(width=WIDTH)
    result = read(queries=1)
    assert result.metrics["cosine_response/shuffled_pairs"] is None
    assert result.metrics["cosine_response/interval_low"] is None
    assert result.deltas == []


def test_the_page_is_the_same_rows(workspace: Path) -> None:
    write_heldout(width=WIDTH)
    result = read(queries=2)
    assert "bread what?" in result.pages["page.html"]
    assert result.pages["page.html"].count('data-name="decoded"') == 2


def test_another_teacher_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heldout(width=WIDTH)
    monkeypatch.setattr("tests.probe.test_interpret.WIDTH", 2)
    with pytest.raises(EvaluationError, match="2 dimensions, the encoder was trained for one of 5"):
        read(queries=2)


def test_another_teacher_of_the_same_width_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heldout(width=WIDTH, teacher={"kind": "fake", "name": "org/made-them"})
    monkeypatch.setattr(Lengths, "identity", {"kind": "fake", "name": "org/other"})
    with pytest.raises(EvaluationError, match="another teacher than that of the targets: its name is 'org/other'"):
        read(queries=2)
    monkeypatch.setattr(Lengths, "identity", {"kind": "fake", "name": "org/made-them"})
    assert read(queries=2).metrics["queries"] == 2
