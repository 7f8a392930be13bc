"""Counts of the responses, taken as they are written, and the shares that gates limit."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.distinct import Distinct
from pipeline.core.histogram import Histogram
from pipeline.core.schemas import FINISH_REASONS, RESPONSES
from pipeline.generate.response_text import ends_in_loop, looks_like_thinking

# A resumed run must know these of finished rows too: they are counted.
_COUNTED = (
    pa.field("truncated", pa.bool_(), nullable=False),
    pa.field("control_tokens", pa.bool_(), nullable=False),  # its text spells some
    pa.field("thinking", pa.bool_(), nullable=False),  # it was stripped
    pa.field("prompt_hash", pa.int64(), nullable=False),
)
STORE = pa.schema([*RESPONSES, *_COUNTED])
COUNTED_ROWS = 4096  # at a time
DROPPED = "dropped"  # kind of error of a row that is too long and so not generated


UNUSUAL = (
    *("empty_responses", "left_thinking"),
    *("truncated_prompts", "control_token_prompts", "stripped_thinking", "repetition_loops"),
)
# Measure of a gate -> what it counts and what to do.
CAUSES = {
    "empty": "of the answers are empty: does strip_thinking leave nothing, is max_new_tokens too low for thinking?",
    "equal": "of the answers repeat another row's: read some; weights, dtype or template may be broken",
    "thinking": "of the answers hold thinking: switch it off in chat_template_kwargs",
    "cut": "of the answers end at max_new_tokens: raise it",
    "equal_prompts": "of the prompts repeat another row's: the template or max_prompt_tokens leaves out what differs",
}
# Share of answers cut at max_new_tokens that is worth a warning, whatever the gate says.
MANY_CUT = 0.5


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
        self._answers, self._prompts = Distinct(), Distinct()

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count the tables (schema `STORE`) and yield them without what was counted."""
        for table in tables:
            for start in range(0, table.num_rows, COUNTED_ROWS):
                self._count(table.slice(start, COUNTED_ROWS))
            yield table.drop_columns([field.name for field in _COUNTED])

    def summary(self) -> dict[str, Any]:
        reasons = {reason: self._reasons[reason] for reason in FINISH_REASONS}
        return {"finish_reason": reasons, **self._unusual, **self._equal(), "errors": dict(self._errors)}

    def shares(self) -> dict[str, float]:
        """The measures of `params.AnswerGates`: shares of the answered rows, 0 to 1."""
        answered, equal = max(1, self._answered), self._equal()
        counts = {
            "empty": self._unusual["empty_responses"],
            "equal": equal["equal_responses"],
            "thinking": self._unusual["left_thinking"],
            "cut": self._reasons["length"],
            "equal_prompts": equal["equal_prompts"],
        }
        return {name: count / answered for name, count in counts.items()}

    @property
    def _answered(self) -> int:
        return self._reasons["stop"] + self._reasons["length"]

    def histograms(self) -> dict[str, dict[str, int]]:
        """Answered rows by tokens of the prompt and of the answer."""
        return {
            "prompt_tokens": self._prompt_tokens.summary(),
            "response_tokens": self._response_tokens.summary(),
        }

    def _equal(self) -> dict[str, int]:
        """Answers and prompts that repeat another row's."""
        repeated = {"equal_responses": self._answers, "equal_prompts": self._prompts}
        return {name: numbers.added - numbers.count for name, numbers in repeated.items()}

    def _count(self, table: pa.Table) -> None:
        self._reasons.update(table.column("finish_reason").to_pylist())
        failed = pc.equal(table.column("finish_reason"), "error")
        self._errors.update(failures(table.filter(failed).select(["error"]).to_pylist()))
        answered = table.filter(pc.invert(failed))
        answers = answered.column("response").to_pylist()
        spoken = [answer for answer in answers if answer.strip()]
        prompts = answered.column("prompt_hash").to_pylist()
        self._unusual["empty_responses"] += len(answers) - len(spoken)
        self._answers.add(map(hash, spoken))
        self._prompts.add(prompts)
        self._unusual["left_thinking"] += sum(map(looks_like_thinking, spoken))
        self._unusual["control_token_prompts"] += pc.sum(answered.column("control_tokens")).as_py() or 0
        self._unusual["repetition_loops"] += sum(map(ends_in_loop, answers))
        self._unusual["truncated_prompts"] += pc.sum(answered.column("truncated")).as_py() or 0
        self._unusual["stripped_thinking"] += pc.sum(answered.column("thinking")).as_py() or 0
        self._prompt_tokens.add(answered.column("prompt_tokens").to_pylist())
        self._response_tokens.add(answered.column("response_tokens").to_pylist())
