"""What needs the text of each row that is still in: checks of it, and its words."""

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from pipeline import queries
from pipeline.corpus.staging import Mask, Rows, Staging
from pipeline.corpus.words import WordFile, WordHasher
from pipeline.runtime import progress

BATCH_ROWS = 1024

Check = Callable[[list[str]], Mask]


def measure(
    frame: pl.DataFrame, staging: Staging, *, checks: Mapping[str, Check], words: WordFile | None = None
) -> pl.DataFrame:
    """The frame after the checks.

    Args:
        frame: of `pipeline.queries`.
        staging: the texts.
        checks: by fate; each says which of some texts to leave out (bool [N]). A text that one leaves out does not meet
            the next.
        words: receives the words of the rows that stay, and is finished here.

    Raises:
        WorkError: the disk is full.
    """
    if not checks and words is None:
        return frame
    hasher = WordHasher()
    left_out: dict[str, list[Rows]] = {fate: [np.zeros(0, np.int64)] for fate in checks}
    wanted = queries.undecided(frame)
    with progress(list[str](), total=int(wanted.sum()), desc="measure") as bar:
        for rows, texts in staging.batches(wanted, BATCH_ROWS):
            bar.update(len(rows))
            for fate, check in checks.items():
                out = check(texts.to_list())
                left_out[fate].append(rows[out])
                rows, texts = rows[~out], texts.filter(~out)
            if words is not None:
                words.append(rows, hasher(texts))
    if words is not None:
        words.finish()
    for fate, parts in left_out.items():
        frame = queries.set_fate(frame, np.concatenate(parts), fate)
    return frame
