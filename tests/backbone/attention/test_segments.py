"""Where sequences lie in a packed row: closed-form lists."""

import pytest
import torch

from pipeline.backbone.attention.segments import SHARED, Segments, shared_prefix

CPU = torch.device("cpu")
# Keys: two shared, three and none of their own in the cache, then two and one new ones.
SEGMENTS = Segments.of([2, 1], [3, 0], shared=2)


def test_positions_go_on_behind_the_cache() -> None:
    assert SEGMENTS.positions(CPU).tolist() == [[5, 6, 2]]
    assert Segments.of([3, 1]).positions(CPU).tolist() == [[0, 1, 2, 0]]


def test_owners_and_positions_of_queries_and_keys() -> None:
    owner, position = SEGMENTS.queries(CPU)
    assert (owner.tolist(), position.tolist()) == ([0, 0, 1], [5, 6, 2])
    owner, position = SEGMENTS.keys(CPU)
    assert owner.tolist() == [SHARED, SHARED, 0, 0, 0, 0, 0, 1]
    assert position.tolist() == [0, 1, 2, 3, 4, 5, 6, 2]


def test_slices_of_each_sequence() -> None:
    assert list(SEGMENTS.slices()) == [
        (slice(0, 2), [slice(0, 2), slice(2, 5), slice(5, 7)]),
        (slice(2, 3), [slice(0, 2), slice(7, 8)]),
    ]
    assert (SEGMENTS.cached, SEGMENTS.total) == (5, (7, 3))


@pytest.mark.parametrize(
    ("rows", "common"), [([[1, 2, 3]], 0), ([[1, 2], [1, 2]], 1), ([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1], [2]], 0)]
)
def test_shared_prefix_leaves_a_token(rows: list[list[int]], common: int) -> None:
    assert shared_prefix(rows) == common
