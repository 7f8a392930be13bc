"""Counts of responses as they pass."""

from typing import Any

import pyarrow as pa

from pipeline.core.schemas import RESPONSES
from pipeline.generate.response_counts import STORE, ResponseCounts


def row(row_id: str, **columns: Any) -> dict[str, Any]:
    usual = {"response": "fine", "finish_reason": "stop", "prompt_tokens": 3, "response_tokens": 1, "error": None}
    counted = {"truncated": False, "control_tokens": False, "thinking": False, "prompt_hash": ord(row_id)}
    return {"id": row_id, **usual, **counted, **columns}


ROWS = [
    row("a", response_tokens=0, response=""),
    row("b", finish_reason="length", response="and so on, " * 30, response_tokens=120),
    row("c", truncated=True, prompt_tokens=8, control_tokens=True),
    row("d", thinking=True, prompt_hash=ord("c")),
    row("h", response="<think>so"),
    row("e", response="", finish_reason="error", error="timeout: 60 s", truncated=True, response_tokens=0),
    row("f", response="", finish_reason="error", error="timeout: 61 s", response_tokens=0),
    row("g", response="", finish_reason="error", error="dropped: longer than max_prompt_tokens", response_tokens=0),
]


def test_every_row_is_counted_once_in_any_pieces() -> None:
    table = pa.Table.from_pylist(ROWS, schema=STORE)
    for size in (1, 3, 100):
        counts = ResponseCounts()
        passed = pa.concat_tables(counts.through(table.slice(at, size) for at in range(0, len(ROWS), size)))
        assert passed.equals(table.select(RESPONSES.names))
        assert counts.summary() == {
            "finish_reason": {"stop": 4, "length": 1, "error": 3},
            "empty_responses": 1,
            "equal_responses": 1,
            "left_thinking": 1,
            "equal_prompts": 1,
            "truncated_prompts": 1,
            "control_token_prompts": 1,
            "stripped_thinking": 1,
            "repetition_loops": 1,
            "errors": {"timeout": 2, "dropped": 1},
        }
        shares = {"empty": 0.2, "equal": 0.2, "thinking": 0.2, "cut": 0.2, "equal_prompts": 0.2}
        assert counts.shares() == shares  # of five answered rows


def test_histograms_hold_the_rows_that_were_answered() -> None:
    counts = ResponseCounts()
    list(counts.through([pa.Table.from_pylist(ROWS, schema=STORE)]))
    histograms = counts.histograms()
    assert histograms["prompt_tokens"] == {"0": 0, "1": 0, "2-3": 4, "4-7": 0, "8-15": 1}
    assert sum(histograms["response_tokens"].values()) == 5
    assert histograms["response_tokens"]["64-127"] == 1


def test_nothing_passed() -> None:
    assert ResponseCounts().summary()["errors"] == {}
    assert set(ResponseCounts().shares().values()) == {0}
    assert ResponseCounts().histograms() == {"prompt_tokens": {}, "response_tokens": {}}
