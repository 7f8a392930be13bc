"""Embeddings in fewer dimensions or bits: as `encode` stores them, and as they are compared.

int8 divides the range of each dimension into 256 steps, binary keeps the sign of each dimension, eight in a byte: both
are sentence-transformers' quantize_embeddings.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.core.errors import SourceError
from pipeline.core.vectors import unit_rows

Precision = Literal["int8", "binary"]


@dataclass(frozen=True)
class Storage:
    """The leading dimensions of embeddings at length 1, quantised; None: all of them as they are, float32."""

    truncate_dim: int | None = None
    quantize: Precision | None = None

    def check(self, width: int) -> None:
        """Raises SourceError if embeddings of `width` cannot be stored so."""
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= width:
            message = f"{self.truncate_dim} of {width} dimensions: must be between 1 and {width}"
            raise SourceError(message, argument="truncate_dim")

    @property
    def dtype(self) -> np.dtype[np.float32] | np.dtype[np.int8]:
        """Of stored values."""
        return np.dtype("<f4") if self.quantize is None else np.dtype("i1")

    def values(self, width: int) -> int:
        """Stored values of an embedding of `width`."""
        dimensions = self.truncate_dim or width
        return -(-dimensions // 8) if self.quantize == "binary" else dimensions

    def bytes(self, width: int) -> int:
        """Bytes of a stored embedding of `width`."""
        return self.values(width) * self.dtype.itemsize

    def truncated(self, vectors: np.ndarray) -> np.ndarray:
        """`[N, width]` as float32 `[N, truncate_dim]`."""
        return vectors if self.truncate_dim is None else unit_rows(vectors[:, : self.truncate_dim])

    def quantized(self, truncated: np.ndarray, ranges: np.ndarray | None = None) -> np.ndarray:
        """Stored values `[N, values]` of what `truncated` gives; int8 needs the `ranges` of `ranges_of`."""
        if self.quantize is None:
            return truncated.astype(self.dtype, copy=False)
        from sentence_transformers.util import quantize_embeddings

        return np.asarray(quantize_embeddings(truncated, self.quantize, ranges=ranges))

    def compared(self, vectors: np.ndarray, ranges: np.ndarray | None = None) -> np.ndarray:
        """Embeddings `[N, width]` as float32 vectors that can be had of their stored values.

        Of int8 the middle of each step; of binary 1 and -1 for each bit, so that a cosine is 1 - 2 x the share of bits
        that differ (the Hamming distance).
        """
        truncated = self.truncated(vectors)
        stored = self.quantized(truncated, ranges)
        if self.quantize == "int8" and ranges is not None:
            return dequantized(stored, ranges)
        if self.quantize is None:
            return stored
        # sentence-transformers moves the packed bytes by 128 into int8.
        packed = (stored.astype(np.int16) + 128).astype(np.uint8)
        return np.unpackbits(packed, axis=1, count=truncated.shape[1]).astype(np.float32) * 2 - 1


def dequantized(stored: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The middle of each value's step, float32 `[N, d]`, of int8 values `[N, d]` and their ranges `[2, d]`."""
    lowest, highest = ranges.astype(np.float32)
    return lowest + (stored.astype(np.float32) + 128.5) * ((highest - lowest) / 255)


def ranges_of(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Smallest and largest value of each dimension `[2, d]` over blocks `[B, d]`, one at least."""
    lowest, highest = zip(*((block.min(axis=0), block.max(axis=0)) for block in blocks), strict=True)
    return np.stack([np.min(lowest, axis=0), np.max(highest, axis=0)])
