"""What became of a few rows, in words."""

from collections.abc import Iterator

import numpy as np

from pipeline.core.text import visible
from pipeline.core.vectors import matrix, top_k
from pipeline.preview.stages import Preview

# Characters of a text that are shown: of a longer one both ends, where a template stands.
SHOWN = 600
NEAREST = 3


def row_lines(found: Preview) -> Iterator[str]:
    """Each row: prompt, answer and why it ended, what was cut, the target's length and its nearest neighbours."""
    answers = {row["id"]: row for row in found.answers.to_pylist()}
    targets = _targets(found)
    queries = found.queries.to_pylist()
    places = {row["id"]: place for place, row in enumerate(queries, start=1)}
    for place, row in enumerate(queries, start=1):
        row_id = row["id"]
        yield f"{place} of {len(queries)}, id {row_id}, from {row['source']}"
        if found.prompts:
            tokens = f"{answers[row_id]['prompt_tokens']} tokens: " if row_id in answers else ""
            yield f"  prompt   {tokens}{one_line(found.prompts[place - 1])}"
        if found.trained_prompts and not found.trained_prompts[place - 1].startswith(found.prompts[place - 1]):
            yield f"  train    {one_line(found.trained_prompts[place - 1])}"
        if row_id in answers:
            yield f"  answer   {_answer(answers[row_id])}"
        for cut in found.cuts[row_id]:
            yield f"  cut      {cut}"
        if row_id in targets:
            norm, nearest = targets[row_id]
            near = ", ".join(f"{places[other]} ({cosine:.3f})" for other, cosine in nearest)
            yield f"  target   length {norm:.4g}, nearest {near or 'none'}"


def _answer(row: dict[str, str]) -> str:
    if row["finish_reason"] == "error":
        return f"none: {row['error']}"
    why = "the model ended it" if row["finish_reason"] == "stop" else "cut"
    return f"{row['response_tokens']} tokens, {why}: {one_line(row['response']) or '(empty)'}"


def _targets(found: Preview) -> dict[str, tuple[float, list[tuple[str, float]]]]:
    """Length of each target, and the ids of the nearest others with their cosines, by id."""
    if not found.targets.num_rows:
        return {}
    ids, vectors = found.targets["id"].to_pylist(), matrix(found.targets["embedding"]).astype(np.float32)
    rows, cosines = top_k(vectors, [vectors], NEAREST + 1)
    lengths = np.linalg.norm(vectors, axis=1)
    return {
        row_id: (
            float(lengths[at]),
            [(ids[other], float(cosine)) for other, cosine in zip(rows[at], cosines[at], strict=True) if other != at][
                :NEAREST
            ],
        )
        for at, row_id in enumerate(ids)
    }


def loss_lines(found: Preview) -> Iterator[str]:
    """The losses before the first update and after the last."""
    if not found.losses:
        return
    first, last = found.losses[0], found.losses[-1]
    for when, step in (("before any update", first), (f"step {last['step']:g}", last)):
        yield f"  {when:<18} alignment {step['align']:.4g}, reconstruction {step['recon']:.4g}"


def one_line(text: str) -> str:
    """A text without control characters, in one line; of a long one both ends."""
    shown = visible(text)
    if len(shown) > SHOWN:
        shown = f"{shown[: SHOWN // 2]} [...] {shown[-SHOWN // 2 :]}"
    return shown.replace("\n", "\\n").replace("\t", "\\t")
