"""The ids of an artifact in one order, a few at a time, whatever tables they lie in."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.artifacts import Artifact
from pipeline.core.schemas import check_ids

READ_ROWS = 4096


def sorted_ids(artifact: Artifact) -> Iterator[pa.Array]:
    """The ids of all tables of an artifact, each of which is sorted, merged into one order, in pieces of any size.

    Raises ContractError if an id occurs twice or a table is not sorted.
    """
    last = pa.array([], pa.string())
    for piece in _merged([_ids(artifact, path.name) for path in artifact.tables()]):
        check_ids(pa.chunked_array([last, piece]), str(artifact.path))
        last = piece[-1:]
        yield piece


def pieces(arrays: Iterable[pa.Array], rows: int) -> Iterator[pa.Array]:
    """Arrays that follow one another, cut into such of `rows` rows; the last may be shorter."""
    held = pa.array([], pa.string())
    for array in arrays:
        held = pa.concat_arrays([held, array])
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
    if len(held):
        yield held


def _ids(artifact: Artifact, name: str) -> Iterator[pa.Array]:
    for batch in artifact.batches(["id"], READ_ROWS, name):
        yield from (chunk for chunk in batch["id"].chunks if len(chunk))


def _merged(sources: list[Iterator[pa.Array]]) -> Iterator[pa.Array]:
    """Sorted sources as one: of each what lies up to the smallest of their last ids at hand."""
    held = {at: first for at, source in enumerate(sources) if (first := next(source, None)) is not None}
    while held:
        bound = min(array[-1].as_py() for array in held.values())
        counts = {at: pc.sum(pc.less_equal(array, bound)).as_py() for at, array in held.items()}
        yield pa.concat_arrays([array[: counts[at]] for at, array in held.items()]).sort()
        for at, count in counts.items():
            held[at] = held[at][count:]
            if not len(held[at]):
                del held[at]
                if (following := next(sources[at], None)) is not None:
                    held[at] = following
