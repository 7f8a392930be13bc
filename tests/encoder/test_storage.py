"""Embeddings in fewer dimensions or bits, by hand."""

import numpy as np
import pytest

from pipeline.encoder.storage import Storage, dequantized, ranges_of

VECTORS = np.array([[3, 4, -1, 0], [-3, 4, 2, 5], [3, -4, 0, 1]], np.float32)


@pytest.mark.parametrize(
    ("storage", "values", "size"),
    [
        (Storage(), 10, 40),
        (Storage(truncate_dim=3), 3, 12),
        (Storage(quantize="int8"), 10, 10),
        (Storage(quantize="binary"), 2, 2),
        (Storage(3, "int8"), 3, 3),
        (Storage(8, "binary"), 1, 1),
    ],
)
def test_what_a_vector_of_ten_dimensions_takes(storage: Storage, values: int, size: int) -> None:
    assert (storage.values(10), storage.bytes(10)) == (values, size)


def test_as_they_are_nothing_changes() -> None:
    np.testing.assert_array_equal(Storage().compared(VECTORS), VECTORS)
    cut = Storage(truncate_dim=2).compared(VECTORS)
    np.testing.assert_allclose(cut, [[0.6, 0.8], [-0.6, 0.8], [0.6, -0.8]], rtol=1e-6)


def test_signs_are_compared_by_how_many_differ() -> None:
    found = Storage(quantize="binary").compared(VECTORS)
    assert found.tolist() == [[1, 1, -1, -1], [-1, 1, 1, 1], [1, -1, -1, 1]]
    cosines = found @ found.T / 4
    assert cosines[0, 1] == 1 - 2 * 3 / 4
    assert Storage(2, "binary").compared(VECTORS).tolist() == [[1, 1], [-1, 1], [1, -1]]


def test_eight_bits_are_steps_of_the_ranges() -> None:
    ranges = ranges_of([VECTORS[:1], VECTORS[1:]])
    assert ranges.tolist() == [[-3, -4, -1, 0], [3, 4, 2, 5]]
    found = Storage(quantize="int8").quantized(VECTORS, ranges)
    # A step may round to the one below.
    np.testing.assert_allclose(found, [[127, 127, -128, -128], [-128, 127, 127, 127], [127, -128, -43, -77]], atol=1)
    beyond = Storage(quantize="int8").quantized(np.array([[9, -9, 9, -9]], np.float32), ranges)
    assert beyond.tolist() == [[127, -128, 127, -128]]


def test_eight_bits_are_compared_by_the_middle_of_their_steps() -> None:
    ranges = ranges_of([VECTORS])
    found = Storage(quantize="int8").compared(VECTORS, ranges)
    half = (ranges[1] - ranges[0]) / 255 / 2
    ends = dequantized(np.array([[-128, 127, 0, 0]], np.int8), ranges)[0, :2]
    np.testing.assert_allclose(ends, np.add([-3, 4], half[:2]), rtol=1e-6)
    assert (np.abs(found - VECTORS) <= 1.01 * half).all()
    # A dimension that does not vary comes back as it is.
    flat = np.array([[2.0, 1.0], [2.0, 3.0]], np.float32)
    np.testing.assert_allclose(Storage(quantize="int8").compared(flat, ranges_of([flat]))[:, 0], 2)
