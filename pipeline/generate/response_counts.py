"""Counts of the responses, taken as they are written."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.histogram import Histogram
from pipeline.core.schemas import FINISH_REASONS, RESPONSES
from pipeline.generate.response_text import ends_in_loop

# The last two are counted in the manifest, so a resumed run must know them of finished rows.
STORE = RESPONSES.append(pa.field("truncated", pa.bool_(), nullable=False)).append(
    pa.field("thinking", pa.bool_(), nullable=False)  # a block of it was stripped
)
DROPPED = "dropped"  # kind of error of a row that is too long and so not generated


UNUSUAL = ("empty_responses", "truncated_prompts", "stripped_thinking", "repetition_loops")


def failures(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Failed rows by kind of error, which is its text up to the first colon."""
    return Counter(str(row["error"]).split(":")[0] for row in rows)


class ResponseCounts:
    """Rows by finish reason and by what is unusual about them, and histograms of their tokens."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._unusual = dict.fromkeys(UNUSUAL, 0)
        self._prompt_tokens, self._response_tokens = Histogram(), Histogram()

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count the tables (schema `STORE`) and yield them in schema `RESPONSES`."""
        for table in tables:
            self._count(table)
            yield table.select(RESPONSES.names)

    def summary(self) -> dict[str, Any]:
        reasons = {reason: self._reasons[reason] for reason in FINISH_REASONS}
        return {"finish_reason": reasons, **self._unusual, "errors": dict(self._errors)}

    def histograms(self) -> dict[str, dict[str, int]]:
        """Answered rows by tokens of the prompt and of the answer."""
        return {
            "prompt_tokens": self._prompt_tokens.summary(),
            "response_tokens": self._response_tokens.summary(),
        }

    def _count(self, table: pa.Table) -> None:
        self._reasons.update(table.column("finish_reason").to_pylist())
        failed = pc.equal(table.column("finish_reason"), "error")
        self._errors.update(failures(table.filter(failed).select(["error"]).to_pylist()))
        answered = table.filter(pc.invert(failed))
        answers = answered.column("response").to_pylist()
        self._unusual["empty_responses"] += sum(not answer.strip() for answer in answers)
        self._unusual["repetition_loops"] += sum(map(ends_in_loop, answers))
        self._unusual["truncated_prompts"] += pc.sum(answered.column("truncated")).as_py() or 0
        self._unusual["stripped_thinking"] += pc.sum(answered.column("thinking")).as_py() or 0
        self._prompt_tokens.add(answered.column("prompt_tokens").to_pylist())
        self._response_tokens.add(answered.column("response_tokens").to_pylist())
