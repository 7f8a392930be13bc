"""The interface of a teacher: texts in, vectors out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class Teacher(Protocol):
    """An embedding model that labels responses."""

    width: int
    identity: dict[str, Any]

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), width], not normalised unless the model itself does so.

        Row i depends on text i alone (up to rounding), so any grouping into batches gives the same targets.
        """
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens that the teacher reads of each text: with special tokens and prompts, without what is cut off."""
        ...

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than the teacher reads: `embed` leaves out their ends."""
        ...
