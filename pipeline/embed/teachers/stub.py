"""A stub for tests and dry runs: pseudo-random vectors seeded by a text's hash."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from pipeline.core.errors import TeacherError

VERSION = 1


class HashTeacher:
    """A `Teacher` of standard normal vectors of `width` dimensions; here a token is a word."""

    max_tokens = None

    def __init__(self, width: int = 64, delay: float = 0.0) -> None:
        """`delay` is in seconds a text. Raises ValueError if `width` is below 1."""
        if width < 1:
            raise ValueError(f"width is {width}, must be at least 1")
        self.width, self._delay = width, delay
        self.identity: dict[str, Any] = {"kind": "hash", "name": "hash", "stub": True}
        self.identity |= {"version": VERSION, "width": width}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """The teacher with these arguments. Raises TeacherError if they are wrong."""
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            raise TeacherError(f"{options}: {error}", argument="options") from None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        time.sleep(self._delay * len(texts))
        return np.stack([self._vector(text) for text in texts]) if texts else np.zeros((0, self.width), np.float32)

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def _vector(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return np.random.default_rng(seed).standard_normal(self.width, dtype=np.float32)
