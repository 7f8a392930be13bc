"""Decontamination: runs of words shared with evaluation texts, and nothing else."""

import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.collect import decontamination
from pipeline.collect.decontamination import BloomFilter, find_contaminated, shared_words
from tests.collect.helpers import token_file

WORDS = [f"w{index}" for index in range(40)]


def run_of(start: int, end: int) -> str:
    return " ".join(WORDS[start:end])


def contaminated(folder: Path, queries: list[str], texts: dict[str, list[str]], ngram: int = 13) -> dict[str, str]:
    """Task and shared words by query."""
    file = token_file(folder, queries)
    found = find_contaminated(file, texts.items(), ngram=ngram)
    file.close()
    assert found.texts == sum(map(len, texts.values()))
    return {
        queries[row]: f"{found.names[task]}: {shared_words(queries[row], position, ngram)}"
        for row, position, task in zip(found.rows, found.positions, found.tasks, strict=True)
    }


def test_thirteen_shared_words_are_contamination_and_twelve_are_not(tmp_path: Path) -> None:
    queries = [f"please tell me: {run_of(5, 18)}", f"please tell me: {run_of(5, 17)} now", "something else"]
    assert contaminated(tmp_path, queries, {"task": [f"x {run_of(3, 30)}"]}) == {queries[0]: f"task: {run_of(5, 18)}"}


def test_case_symbols_and_line_ends_do_not_hide_it(tmp_path: Path) -> None:
    query = "(Q) " + run_of(0, 13).upper().replace(" ", ",\n") + "?"
    assert contaminated(tmp_path, [query], {"t": [run_of(0, 20)]}) == {query: f"t: {run_of(0, 13)}"}


@pytest.mark.parametrize(
    ("query", "text", "same"),
    [
        ("What is the capital of France?", "what is the capital of france", True),
        ("What is the capital of France?", "Tell me: what is the capital of France?", False),
        ("What is the capital", "What is the capital of France?", False),
        ("France", "France!", True),
        ("What is 2+2?", "What is 2 - 2?", True),  # symbols do not count here
        ("???", "!!!", False),
        ("", "", False),
    ],
)
def test_shorter_texts_count_when_their_words_are_equal(tmp_path: Path, query: str, text: str, same: bool) -> None:
    assert (query in contaminated(tmp_path, [query], {"t": [text]})) is same


def test_the_first_task_and_the_first_run_are_named(tmp_path: Path) -> None:
    query = f"{run_of(0, 15)} and {run_of(20, 36)}"
    texts = {"one": [run_of(20, 36)], "two": [run_of(0, 15)], "three": [query]}
    assert contaminated(tmp_path, [query], texts) == {query: f"two: {run_of(0, 13)}"}
    assert contaminated(tmp_path, [query], {"three": [query], **texts})[query].startswith("three: ")


def test_any_number_of_texts_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    vocabulary = [f"v{index}" for index in range(500)]
    queries = [" ".join(rng.choices(vocabulary, k=30)) for _ in range(200)]
    texts = [" ".join(rng.choices(vocabulary, k=50)) for _ in range(300)]
    for index in range(0, 300, 10):
        texts[index] += " " + " ".join(queries[index // 2].split()[4:20])
    batches = [(f"t{start}", texts[start : start + 7]) for start in range(0, 300, 7)]
    expected = {queries[index // 2] for index in range(0, 300, 10)}
    for most_bits, merge_above in (
        (2**31, 4_000_000),
        (2**10, 20),
    ):  # a filter that lets nearly all through changes nothing
        monkeypatch.setattr(decontamination, "_MOST_BITS", most_bits)
        monkeypatch.setattr(decontamination, "_MERGE_ABOVE", merge_above)
        file = token_file(tmp_path, queries)
        found = find_contaminated(file, batches, ngram=13)
        file.close()
        assert {queries[row] for row in found.rows} == expected


def test_without_queries_or_texts_nothing_is_found(tmp_path: Path) -> None:
    assert contaminated(tmp_path, [], {"t": ["a text"]}) == {}
    assert contaminated(tmp_path, ["a text"], {}) == {}


def test_the_filter_has_no_false_negatives_and_few_false_positives() -> None:
    rng = np.random.default_rng(0)
    known, others = rng.integers(0, 2**64, (2, 100_000), dtype=np.uint64)
    filter_ = BloomFilter(len(known))
    filter_.add(known)
    assert filter_.has(known).all()
    assert filter_.has(others).mean() < 0.03
    assert not BloomFilter(0).has(others).any()
