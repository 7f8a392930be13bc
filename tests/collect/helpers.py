"""Texts as a file of tokens."""

from pathlib import Path

import numpy as np

from pipeline.collect.ngrams import TokenFile, TokenHasher


def token_file(folder: Path, texts: list[str], rows: list[int] | None = None) -> TokenFile:
    """The tokens of `texts`, which have the row numbers `rows` (default: their order)."""
    file = TokenFile(folder / "words")
    file.append(np.array(rows if rows is not None else range(len(texts)), dtype=np.int64), TokenHasher()(texts))
    file.finish()
    return file
