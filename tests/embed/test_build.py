"""The transform that embed chooses by the vectors it stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.target_transform import TransformParams
from pipeline.embed.build import make_finish
from pipeline.embed.params import EmbedParams


@dataclass
class Stored:
    """An embedder that stored these vectors."""

    vectors: list[list[float]]

    def tables(self, *_: Any) -> Iterator[pa.Table]:
        rows = pa.FixedSizeListArray.from_arrays(np.array(self.vectors, np.float32).reshape(-1), 2)
        yield pa.table({"id": [str(row) for row in range(len(rows))], "embedding": rows})


def choose(vectors: list[list[float]]) -> tuple[Any, dict[str, Any]]:
    params = SimpleNamespace(normalize=False, dtype="float32", transform=TransformParams(kind="auto"))
    return make_finish(cast(Any, Stored(vectors)), cast(Any, []), [], cast(EmbedParams, params))


def test_auto_standardizes_what_points_one_way() -> None:
    # The cosine is (4 x 2 - 1) / sqrt(17 x 5); mean (3, 0), standard deviations (1, 1).
    finish, facts = choose([[4, 1], [2, -1]])
    assert (facts["kind"], facts["fitted_rows"]) == ("standardize", 2)
    assert facts["anisotropy_before"] == pytest.approx(7 / np.sqrt(85), abs=1e-6)
    assert finish.transform is not None
    assert finish.transform.identity["kind"] == "standardize"
    np.testing.assert_allclose(
        finish.transform.map(np.array([[4, 1], [2, -1], [5, 0]], np.float32)), [[1, 1], [-1, -1], [2, 0]]
    )


def test_auto_leaves_what_does_not() -> None:
    # The cosine is (-1.5 + 2) / sqrt(5 x 3.25).
    finish, facts = choose([[1, 2], [-1.5, 1]])
    assert finish.transform is None
    assert facts == {"kind": "none", "anisotropy_before": pytest.approx(0.5 / np.sqrt(16.25), abs=1e-6)}
