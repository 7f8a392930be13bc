"""The resumable embedding loop with teachers whose vectors are known in advance."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts import RESPONSES, check_table, targets_schema
from pipeline.errors import TeacherError
from pipeline.shards import ShardStore
from pipeline.targets import (
    Embedder,
    EmbedParams,
    NormStatistics,
    cast,
    check_vectors,
    fingerprint,
    rows_per_part,
    unit_length,
    usable_responses,
)
from pipeline.teachers import TeacherParams

TEXTS = {f"{index:02d}": "x" * (index + 1) for index in range(10)}
IDS = sorted(TEXTS)


class LengthTeacher:
    """Embeds a text as [3 * its length, 4 * its length]; remembers what it is asked."""

    width = 2

    def __init__(self, bad: str | None = None, value: float = np.nan) -> None:
        self.bad, self.value = bad, value
        self.asked: list[str] = []
        self.identity: dict[str, Any] = {"name": "length"}

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.asked += texts
        rows = [[self.value] * 2 if text == self.bad else [3.0 * len(text), 4.0 * len(text)] for text in texts]
        return np.array(rows, np.float32)


Run = Callable[..., pa.Table]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Embed texts over the same store and give the table of targets."""

    def run(
        teacher: LengthTeacher, texts: Mapping[str, str] = TEXTS, normalize: bool = False, dtype: Any = "float32"
    ) -> pa.Table:
        with ShardStore(tmp_path / "work", targets_schema(2, dtype), {"normalize": normalize}) as store:
            embedder = Embedder(store, teacher, normalize, dtype, chunk_rows=4)
            embedder.run(texts)
            return pa.concat_tables(embedder.tables(texts, 3))

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_vector_a_text_in_the_stored_type(run: Run, dtype: str) -> None:
    table = run(LengthTeacher(), dtype=dtype)
    check_table(table, targets_schema(2, dtype), "targets")
    expected = [[3.0 * (index + 1), 4.0 * (index + 1)] for index in range(10)]
    assert table.to_pydict() == {"id": IDS, "embedding": expected}


def test_only_missing_rows_are_computed(run: Run) -> None:
    run(LengthTeacher(), {row_id: TEXTS[row_id] for row_id in IDS[:7]})
    teacher = LengthTeacher()
    assert run(teacher).num_rows == 10
    assert teacher.asked == [TEXTS[row_id] for row_id in IDS[7:]]
    again = LengthTeacher()
    run(again)
    assert again.asked == []


def test_equal_texts_are_embedded_once_and_changed_ones_anew(run: Run) -> None:
    teacher = LengthTeacher()
    table = run(teacher, {"a": "yes", "b": "no", "c": "yes", "d": "yes"})
    assert sorted(teacher.asked) == ["no", "yes"]
    expected = {"id": ["a", "b", "c", "d"], "embedding": [[9.0, 12.0], [6.0, 8.0], [9.0, 12.0], [9.0, 12.0]]}
    assert table.to_pydict() == expected
    teacher = LengthTeacher()
    table = run(teacher, {"a": "no", "b": "perhaps"})
    assert teacher.asked == ["perhaps"]
    assert table.to_pydict() == {"id": ["a", "b"], "embedding": [[6.0, 8.0], [21.0, 28.0]]}


def test_normalised_targets_have_length_one(run: Run) -> None:
    table = run(LengthTeacher(), normalize=True)
    np.testing.assert_allclose(table["embedding"].to_pylist(), [[0.6, 0.8]] * 10, atol=1e-6)


def test_a_bad_row_is_named_and_earlier_rows_are_kept(run: Run) -> None:
    with pytest.raises(TeacherError, match=r"NaN or infinite values for 1 of 4 texts: 05: try embed\.teacher\.dtype"):
        run(LengthTeacher(bad=TEXTS["05"]))
    teacher = LengthTeacher()
    run(teacher)
    assert teacher.asked == [TEXTS[row_id] for row_id in IDS[4:]]


def test_overflow_of_float16_names_the_key_and_the_value(run: Run) -> None:
    message = r"embed\.dtype: float16 holds up to 65504, the teacher gave 70000 for 1 of 4 texts: 05: set embed\.dtype"
    with pytest.raises(TeacherError, match=message):
        run(LengthTeacher(bad=TEXTS["05"], value=-70000), dtype="float16")
    run(LengthTeacher(bad=TEXTS["05"], value=-70000), dtype="float32")


def test_a_zero_vector_has_no_direction() -> None:
    with pytest.raises(TeacherError, match=r"embed\.normalize: .* zeros for 1 of 2 texts: b"):
        unit_length(["a", "b"], np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_a_wrong_shape_says_both_shapes() -> None:
    with pytest.raises(TeacherError, match=r"array \(1, 3\) for 2 texts, must be \(2, 3\)"):
        check_vectors(["a", "b"], np.zeros((1, 3)), 3)


def test_many_bad_rows_are_named_in_part() -> None:
    vectors = np.full((20, 2), np.inf)
    with pytest.raises(TeacherError, match=r"20 of 20 texts: 0, 1, 2, 3, 4 and 15 more"):
        check_vectors([str(index) for index in range(20)], vectors, 2)


def test_the_largest_float16_fits() -> None:
    assert cast(["a"], np.array([[65504.0]]), "float16").tolist() == [[65504.0]]
    assert cast([], np.zeros((0, 2)), "float16").shape == (0, 2)


def test_usable_responses_and_why_others_are_not() -> None:
    rows = [
        {"id": "a", "response": "yes", "finish_reason": "stop"},
        {"id": "b", "response": " \n\u2003", "finish_reason": "stop"},
        {"id": "c", "response": "cut sho", "finish_reason": "length"},
        {"id": "d", "response": "", "finish_reason": "error"},
    ]
    schema = pa.schema([RESPONSES.field(name) for name in ("id", "response", "finish_reason")])
    usable = usable_responses(pa.Table.from_pylist(rows, schema=schema))
    assert usable.texts == {"a": "yes", "c": "cut sho"}
    assert usable.skipped == {"error": 1, "empty": 1}


def test_norm_statistics_over_all_tables() -> None:
    schema = targets_schema(2, "float16")
    tables = [
        pa.Table.from_pylist([{"id": "a", "embedding": [3.0, 4.0]}], schema=schema),
        pa.Table.from_pylist([{"id": "b", "embedding": [0.0, 1.0]}], schema=schema),
        schema.empty_table(),
    ]
    norms = NormStatistics()
    assert list(norms.through(tables)) == tables
    assert norms.summary() == {"norm_mean": 3.0, "norm_std": 2.0}
    assert NormStatistics().summary() == {"norm_mean": 0.0, "norm_std": 0.0}


def test_fingerprint_follows_what_changes_a_target() -> None:
    def of(**keys: Any) -> dict[str, Any]:
        return fingerprint(LengthTeacher(), EmbedParams(teacher=TeacherParams(kind="hash", batch_size=7), **keys))

    assert of() == of(normalize=False, dtype="float16")
    assert of() != of(normalize=True)
    assert of() != of(dtype="float32")


def test_parts_are_bounded() -> None:
    assert rows_per_part(4096, "float16") * (4096 * 2 + 64) <= 256 * 2**20
    assert rows_per_part(64, "float16") > rows_per_part(64, "float32") > 500_000
