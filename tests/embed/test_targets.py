"""The resumable embedding loop with teachers whose vectors are known in advance."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.artifacts import PART_BYTES
from pipeline.core.errors import TeacherError
from pipeline.core.row_store import ShardStore
from pipeline.core.schemas import RESPONSES, check_table, targets_schema
from pipeline.core.target_transform import TargetTransform, TransformParams
from pipeline.core.vectors import matrix
from pipeline.embed.params import EmbedParams, TeacherParams
from pipeline.embed.statistics import TargetStatistics
from pipeline.embed.targets import (
    Embedder,
    Finish,
    Row,
    UsableResponses,
    cast,
    check_vectors,
    fingerprint,
    rows_per_part,
    store_key,
    store_schema,
    target_params,
    unit_length,
)

TEXTS = {f"{index:02d}": "x" * (index + 1) for index in range(10)}
IDS = sorted(TEXTS)


class LengthTeacher:
    """Embeds a text as [3 * its length, 4 * its length]; remembers what it is asked."""

    width = 2
    max_tokens = 7

    def __init__(self, bad: str | None = None, value: float = np.nan) -> None:
        self.bad, self.value = bad, value
        self.asked: list[str] = []
        self.identity: dict[str, Any] = {"name": "length"}

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.asked += texts
        rows = [[self.value] * 2 if text == self.bad else [3.0 * len(text), 4.0 * len(text)] for text in texts]
        return np.array(rows, np.float32)

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]


Run = Callable[..., pa.Table]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Embed texts over the same store and give the table of targets."""

    def run(
        teacher: LengthTeacher,
        texts: Mapping[str, str] = TEXTS,
        normalize: bool = False,
        dtype: Any = "float32",
        transform: TargetTransform | None = None,
    ) -> pa.Table:
        rows = [Row(row_id, store_key(row_id, text), text) for row_id, text in sorted(texts.items())]
        finish = Finish(normalize, dtype, transform)
        with ShardStore(tmp_path / "work", store_schema(2), {"kept": "as the teacher gave it"}) as store:
            embedder = Embedder(store, teacher, chunk_texts=4, chunk_characters=1000)
            embedder.run(rows)
            return pa.concat_tables(TargetStatistics().through(map(finish, embedder.tables(rows, 3))))

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


@pytest.mark.parametrize(
    ("texts", "characters", "chunks"), [(4, 1000, [4, 4, 2]), (9, 12, [4, 2, 1, 1, 1, 1]), (99, 999, [10])]
)
def test_the_teacher_gets_chunks_of_limited_texts_and_characters(
    tmp_path: Path, texts: int, characters: int, chunks: list[int]
) -> None:
    calls = []

    class Counting(LengthTeacher):
        def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
            calls.append(len(texts))
            return super().embed(texts)

    rows = [Row(row_id, store_key(row_id, text), text) for row_id, text in TEXTS.items()]
    with ShardStore(tmp_path, store_schema(2), {}) as store:
        Embedder(store, Counting(), chunk_texts=texts, chunk_characters=characters).run(rows)
    assert calls == chunks


def test_a_changed_answer_is_embedded_anew_and_an_unchanged_one_is_not(run: Run) -> None:
    run(LengthTeacher(), {"a": "yes", "b": "no", "c": "yes"})
    teacher = LengthTeacher()
    table = run(teacher, {"a": "no", "b": "no", "c": "yes"})
    assert teacher.asked == ["no"]
    assert table.to_pydict() == {"id": ["a", "b", "c"], "embedding": [[6.0, 8.0], [6.0, 8.0], [9.0, 12.0]]}


@pytest.mark.parametrize(("normalize", "scale"), [(False, 1.0), (True, 1 / 15)])
def test_a_querys_vector_is_the_mean_over_its_samples(tmp_path: Path, normalize: bool, scale: float) -> None:
    """Of lengths 1, 4, 4 the mean is 3, so [9, 12]; one is longer than the teacher reads."""
    table = pa.table(
        {
            "id": ["00", "01", "02"],
            "response": ["x", "x" * 8, "failed"],
            "finish_reason": ["stop", "length", "error"],
            "samples": [["x" * 4, "x" * 4], [], []],
        }
    )
    usable, teacher = UsableResponses(lambda: [table], samples=3), LengthTeacher()
    with ShardStore(tmp_path / "work", store_schema(2), {}) as store:
        embedder = Embedder(store, teacher, chunk_texts=4, chunk_characters=1000)
        embedder.run(usable)
        assert embedder.rows == embedder.computed_rows == len(store) == 3  # equal samples of a query are one row
        [stored] = embedder.tables(usable, 5)
        [one, two] = embedder.tables(usable, 1)
    assert pa.concat_tables([one, two]).equals(stored)
    assert stored["id"].to_pylist() == ["00", "01"]
    assert (stored["tokens"].to_pylist(), stored["truncated"].to_pylist()) == ([9, 7], [False, True])
    assert matrix(stored["embedding"]).tolist() == [[9.0, 12.0], [24.0, 32.0]]
    targets = matrix(Finish(normalize, "float32")(stored)["embedding"])
    np.testing.assert_allclose(targets[0], np.array([9, 12]) * scale, rtol=1e-6)


def test_normalised_targets_have_length_one(run: Run) -> None:
    table = run(LengthTeacher(), normalize=True)
    np.testing.assert_allclose(table["embedding"].to_pylist(), [[0.6, 0.8]] * 10, atol=1e-6)


def test_a_bad_row_is_named_and_earlier_rows_are_kept(run: Run) -> None:
    with pytest.raises(TeacherError, match=r"^teacher\.dtype: .* 1 of 4 texts: 05: try float32"):
        run(LengthTeacher(bad=TEXTS["05"]))
    teacher = LengthTeacher()
    run(teacher)
    assert teacher.asked == [TEXTS[row_id] for row_id in IDS[4:]]


def test_overflow_of_float16_names_the_key_and_the_value(run: Run) -> None:
    message = r"^dtype: float16 holds up to 65504, .* 70000 for 1 of 3 texts: 05"
    with pytest.raises(TeacherError, match=message):
        run(LengthTeacher(bad=TEXTS["05"], value=-70000), dtype="float16")
    again = LengthTeacher(bad=TEXTS["05"], value=-70000)
    run(again, dtype="float32")
    assert again.asked == []


def test_what_is_made_of_kept_vectors_embeds_nothing_again(run: Run) -> None:
    run(LengthTeacher())
    again = LengthTeacher()
    half = np.array([0.5, 0.25], np.float32)
    transform = TargetTransform("standardize", False, np.array([3, 4], np.float32), half, 1 / half)
    assert run(again, transform=transform)["embedding"].to_pylist() == [[1.5 * row, row] for row in range(10)]
    narrow = np.array([[1], [0]], np.float32)
    to_one = TargetTransform("whiten", True, np.zeros(2, np.float32), narrow, narrow.T)
    table = run(again, normalize=True, dtype="float16", transform=to_one)
    check_table(table, targets_schema(1, "float16"), "targets")
    np.testing.assert_allclose(table["embedding"].to_pylist(), [[0.6]] * 10, atol=1e-3)
    assert again.asked == []


def test_a_zero_vector_has_no_direction() -> None:
    with pytest.raises(TeacherError, match=r"^normalize: .* 1 of 2 texts: b"):
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
    table = pa.Table.from_pylist(rows, schema=schema)
    usable = UsableResponses(lambda: iter([table.slice(0, 3), table.slice(3)]))
    for _ in range(2):
        assert [(row.id, row.text) for row in usable] == [("a", "yes"), ("c", "cut sho")]
        assert usable.skipped == {"error": 1, "empty": 1}


def test_a_key_follows_the_query_and_the_text_and_sorts_like_the_id() -> None:
    first, second = "0123456789abcdef" * 2, "1123456789abcdef" * 2
    assert store_key(first, "yes") != store_key(first, "no")
    assert store_key(first, "yes") < store_key(second, "a") > store_key(first, "no")
    assert len(store_key(first, "yes")) == 32


def test_fingerprint_follows_what_changes_a_kept_vector_and_the_manifest_what_changes_a_target() -> None:
    def of(**keys: Any) -> dict[str, Any]:
        return target_params(EmbedParams(teacher=TeacherParams(kind="hash", batch_tokens=7), **keys))

    other = LengthTeacher()
    other.identity = {"name": "other"}
    assert fingerprint(LengthTeacher()) != fingerprint(other)
    assert of() == of(normalize=False, dtype="float16", transform=TransformParams())
    assert of() != of(normalize=True)
    assert of() != of(dtype="float32")
    assert of() != of(transform=TransformParams(kind="center"))


def test_parts_are_bounded() -> None:
    assert rows_per_part(4096, "float16") * (4096 * 2 + 64) <= PART_BYTES
    assert rows_per_part(256, "float16") > rows_per_part(256, "float32") > 100_000
    assert rows_per_part(1, "float16") == 2**18
