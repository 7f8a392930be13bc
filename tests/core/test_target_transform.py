"""A fitted transform as params choose it and as a file keeps it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import validate
from pipeline.core.errors import ParamsError, TeacherError
from pipeline.core.target_transform import BLOCK_ROWS, TRANSFORM_FILE, TargetTransform, TransformParams, load_transform


def quarter_turn(unit_length: bool = False) -> TargetTransform:
    """Turns the plane around (1, 2) and doubles it."""
    forward = np.array([[0, 2], [-2, 0]], np.float32)
    return TargetTransform("whiten", unit_length, np.array([1, 2], np.float32), forward, np.linalg.inv(forward))


def test_forward_and_back() -> None:
    vectors = np.array([[2, 2], [1, 3], [1, 2]], np.float32)
    mapped = quarter_turn()(vectors)
    assert mapped.tolist() == [[0, 2], [-2, 0], [0, 0]]
    assert quarter_turn().invert(mapped).tolist() == vectors.tolist()


def test_vectors_get_length_one_first_where_that_was_so() -> None:
    transform = quarter_turn(unit_length=True)
    np.testing.assert_allclose(transform(np.array([[30.0, 40.0]])), transform.map(np.array([[0.6, 0.8]])), rtol=1e-6)
    assert np.isfinite(transform(np.zeros((1, 2)))).all()


def test_more_rows_than_a_block() -> None:
    vectors = np.random.default_rng(0).normal(size=(BLOCK_ROWS + 3, 2))
    np.testing.assert_allclose(quarter_turn()(vectors)[-1:], quarter_turn()(vectors[-1:]))
    assert quarter_turn()(vectors[:0]).shape == (0, 2)


def test_saved_and_loaded(tmp_path: Path) -> None:
    transform = quarter_turn(unit_length=True)
    transform.save(tmp_path)
    loaded = load_transform(tmp_path)
    assert loaded is not None
    assert loaded.identity == transform.identity
    assert (loaded.kind, loaded.unit_length, loaded.width, loaded.teacher_width) == ("whiten", True, 2, 2)
    assert (tmp_path / TRANSFORM_FILE).read_bytes() == transform.to_bytes()
    assert load_transform(tmp_path / "elsewhere") is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / TRANSFORM_FILE).write_bytes(quarter_turn().to_bytes()[:40])
    with pytest.raises(TeacherError, match=r"transform\.safetensors is damaged .* run embed and train again"):
        load_transform(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "pca"}, "kind: Input should be 'auto', 'none', 'center'"),
        ({"kind": "center", "components": 2}, "kind center takes no components"),
        ({"components": 2}, "kind none takes no components"),
        ({"kind": "standardize", "shrinkage": 0.5}, "kind standardize takes no shrinkage without decorrelate"),
        ({"kind": "whiten", "decorrelate": 0.5}, "kind whiten takes no decorrelate"),
        ({"kind": "standardize", "decorrelate": 1.5}, "decorrelate"),
        ({"kind": "remove-components"}, "kind remove-components needs components"),
        ({"kind": "whiten", "shrinkage": 1.5}, "shrinkage"),
        ({"kind": "whiten", "components": 0}, "components"),
        ({"kind": "rotate", "rotate": True}, "kind rotate takes no rotate"),
        ({"kind": "whiten", "rotate": True}, "kind whiten takes no rotate"),
    ],
)
def test_mistakes_in_params(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        validate(content, TransformParams, where="embed.transform")
