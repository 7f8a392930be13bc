"""The interface of a teacher: texts in, vectors out."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Teacher(Protocol):
    """An embedding model that labels responses.

    Attributes:
        width: dimensions of an embedding.
        identity: what pins the embeddings.
        max_tokens: tokens that it reads of a text; None: all.
    """

    width: int
    identity: dict[str, Any]
    max_tokens: int | None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings float32 [len(texts), width], not normalised unless the model itself does so.

        Row i depends on text i alone (up to rounding), so any grouping into batches gives the same targets.
        """
        ...

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each whole text, with special tokens and prompts; `embed` cuts off those beyond `max_tokens`."""
        ...
