"""Samples of a query as rows of their own, and gathered into one."""

from collections.abc import Sequence

import pyarrow as pa
import pytest

from pipeline.core.schemas import RESPONSES, check_ids, check_table, responses_schema, samples_of
from pipeline.generate.samples import gathered, is_first, sampled_ids, sampled_rows

IDS = pa.array(["0a", "0b"])


def answers(*answers: tuple[str, str]) -> pa.Table:
    """Three samples of each query, as text and finish reason."""
    rows = [
        {
            "id": row_id,
            "response": text,
            "finish_reason": reason,
            "prompt_tokens": 5,
            "response_tokens": len(text),
            "error": "x" if reason == "error" else None,
        }
        for row_id, (text, reason) in zip(sampled_ids(IDS, 3).to_pylist(), answers, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=RESPONSES)


def gather(*given: tuple[str, str]) -> Sequence[dict[str, object]]:
    [table] = gathered([answers(*given)], 3)
    return check_table(table, responses_schema(3), "responses").to_pylist()


def test_ids_of_samples_are_sorted_and_the_first_has_the_querys() -> None:
    ids = sampled_ids(IDS, 12)
    check_ids(pa.chunked_array([ids]), "ids")
    assert ids.to_pylist()[:3] == ["0a", "0a.01", "0a.02"]
    assert [row_id for row_id in ids.to_pylist() if is_first(row_id)] == ["0a", "0b"]
    assert sampled_ids(IDS, 1) is IDS


def test_each_row_stands_there_once_a_sample() -> None:
    table = pa.table({"id": IDS, "text": ["one", "two"]})
    assert sampled_rows(table, 2).to_pydict() == {
        "id": ["0a", "0a.01", "0b", "0b.01"],
        "text": ["one", "one", "two", "two"],
    }
    assert sampled_rows(table, 1) is table


def test_the_first_usable_sample_stands_for_its_query() -> None:
    first, second = gather(
        ("a", "stop"), ("b", "length"), ("a", "stop"), ("", "error"), (" ", "stop"), ("third", "length")
    )
    assert (first["id"], first["response"], first["finish_reason"], first["samples"]) == ("0a", "a", "stop", ["b", "a"])
    assert (second["id"], second["response"], second["finish_reason"]) == ("0b", "third", "length")
    assert (second["samples"], second["response_tokens"], second["error"]) == ([], 5, None)


def test_without_a_usable_sample_the_first_one_says_why() -> None:
    blank, failed = gather(("", "stop"), ("", "error"), (" ", "stop"), ("", "error"), ("", "stop"), ("", "error"))
    assert (blank["finish_reason"], blank["samples"]) == ("stop", [])
    assert (failed["finish_reason"], failed["error"], failed["samples"]) == ("error", "x", [])


@pytest.mark.parametrize(
    ("params", "samples"), [({}, 1), ({"generate": {}}, 1), ({"generate": {"samples_per_query": 4}}, 4)]
)
def test_the_manifest_says_how_many_there_are(params: dict[str, dict[str, int]], samples: int) -> None:
    assert samples_of(params) == samples
    assert ("samples" in responses_schema(samples).names) == (samples > 1)
