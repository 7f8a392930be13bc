"""Texts as a file of words."""

from pathlib import Path

import numpy as np

from pipeline.collect.ngrams import WordFile, WordHasher


def word_file(folder: Path, texts: list[str], rows: list[int] | None = None) -> WordFile:
    """The words of `texts`, which have the row numbers `rows` (default: their order)."""
    file = WordFile(folder / "words")
    file.append(np.array(rows if rows is not None else range(len(texts)), dtype=np.int64), WordHasher()(texts))
    file.finish()
    return file
