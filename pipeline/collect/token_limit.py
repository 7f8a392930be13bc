"""Texts with too many tokens, most of them told without tokenising the text.

Tokenising is most of what reading a corpus costs, and words repeat: each is tokenised once, and a text's words add up
to an estimate. Only a text whose estimate comes near the limit is tokenised itself. Most tokenizers split a text before
its spaces first, so that the estimate is exact; none was met whose tokens of a text are half as many again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.backbone.token_ids import token_counts
from pipeline.collect.spill import Mask

MARGIN = 2.0
"""Estimates of the limit over this are taken for sure."""
_LONGEST_WORD = 64  # characters; scripts without spaces have longer ones, which do not repeat
_KNOWN_WORDS = 500_000  # about 60 MB


class TokenLimit:
    """A check for texts with more than `limit` tokens, special tokens not counted."""

    def __init__(self, limit: int, tokenizer: Any) -> None:
        self._limit, self._tokenizer = limit, tokenizer
        self._known: dict[str, int] = {}

    def __call__(self, texts: Sequence[str]) -> Mask:
        """Which of the texts have more: bool [N]."""
        over = np.zeros(len(texts), dtype=bool)
        # No tokenizer makes two tokens of an ASCII character; one token may mark the start of the text.
        unsure = [row for row, text in enumerate(texts) if len(text) >= self._limit or not text.isascii()]
        unsure = [row for row, sure in zip(unsure, self._fit([texts[row] for row in unsure]), strict=True) if not sure]
        if unsure:
            over[unsure] = np.array(token_counts(self._tokenizer, [texts[row] for row in unsure])) > self._limit
        return over

    def _fit(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts are far below the limit by their words."""
        split = [text.split(" ") for text in texts]
        short = [max(map(len, words)) <= _LONGEST_WORD for words in split]
        self._learn({word for words, all_short in zip(split, short, strict=True) if all_short for word in words})
        known = self._known
        return [
            all_short and MARGIN * sum(map(known.__getitem__, words)) <= self._limit
            for words, all_short in zip(split, short, strict=True)
        ]

    def _learn(self, words: set[str]) -> None:
        """Count the tokens of new words, each as it stands behind another."""
        if len(self._known) > _KNOWN_WORDS:
            self._known.clear()
        new = [word for word in words if word not in self._known]
        self._known |= zip(new, token_counts(self._tokenizer, [f" {word}" for word in new]), strict=True)
