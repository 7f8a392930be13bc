"""Joining, tokenising and ordering of training rows."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline import contracts
from pipeline.backbone import PromptFormatter
from pipeline.encoder.data import drop_loops, epoch_order, join, steps, tokenize
from pipeline.errors import TrainingError
from tests.conftest import tiny_tokenizer


def tables(finish: str = "stop") -> tuple[pa.Table, pa.Table, pa.Table]:
    queries = pa.table({"id": ["a", "b", "c"], "text": ["qa", "qb", "qc"], "source": ["s"] * 3}, contracts.QUERIES)
    responses = pa.Table.from_pylist(
        [
            {"id": name, "response": f"r{name}", "finish_reason": finish, "prompt_tokens": 1, "response_tokens": 2}
            for name in "abcd"
        ],
        contracts.RESPONSES,
    )
    targets = pa.Table.from_pylist(
        [{"id": name, "embedding": [float(ord(name)), 0.5]} for name in "acd"], contracts.targets_schema(2, "float16")
    )
    return queries, responses, targets


def test_join_keeps_queries_with_a_target_in_order() -> None:
    joined = join(*tables())
    assert joined["id"].to_pylist() == ["a", "c"]
    assert joined["response"].to_pylist() == ["ra", "rc"]
    assert joined["embedding"].to_pylist() == [[97.0, 0.5], [99.0, 0.5]]


def test_join_of_nothing_is_an_error() -> None:
    queries, responses, targets = tables()
    with pytest.raises(TrainingError, match="none of 3 queries has a target"):
        join(queries, responses, targets.slice(0, 0))


def test_answers_that_end_in_a_loop_can_be_left_out() -> None:
    joined = join(*tables())
    looping = joined.set_column(joined.column_names.index("response"), "response", [["no, " * 50, "rc"]])
    assert drop_loops(looping)["id"].to_pylist() == ["c"]
    assert drop_loops(joined).equals(joined)
    with pytest.raises(TrainingError, match=r"train\.drop_loops: all 1 responses end in a repetition loop"):
        drop_loops(looping.slice(0, 1))


@pytest.mark.parametrize(("finish", "limit", "ends"), [("stop", 10, True), ("length", 10, False), ("stop", 2, False)])
def test_eos_only_where_the_model_stopped(finish: str, limit: int, ends: bool) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenize(join(*tables(finish)), PromptFormatter(tokenizer, "raw", 20), tokenizer, limit)
    plain = tokenizer("ra")["input_ids"]
    assert rows.response_ids[0] == ([*plain, tokenizer.eos_token_id] if ends else plain[:limit])
    assert rows.targets.dtype == np.float32
    assert rows.targets.tolist() == [[97.0, 0.5], [99.0, 0.5]]


def test_steps_cover_each_epoch_once_in_a_new_order() -> None:
    batches = list(steps(10, batch_size=4, epochs=2, max_steps=None, seed=3))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for batch in half for row in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(list(steps(10, 4, 2, 5, 3))) == 5
    assert epoch_order(10, 0, 3).tolist() == first
