"""Questions with choices in the forms in which they are published."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import EvaluationError
from pipeline.tasks.choices import ChoiceColumns, choice_accuracy, choice_columns
from pipeline.tasks.local_dataset import LocalData
from pipeline.tasks.local_tasks import layout_of, load_choices, local_task
from tests.evaluate.fakes import write_folder

FORMS: dict[str, list[dict[str, Any]]] = {
    "lists": [
        {"question": "one", "choices": ["a", "b", "c"], "answer": 2},
        {"question": "two", "choices": ["b", "d"], "answer": 0},
    ],
    "rarb": [
        {"instructions": "Retrieve.", "queries": "one", "documents": "['a', 'b', \"c\"]", "labels": "2"},
        {"instructions": "Retrieve.", "queries": "two", "documents": "['b', 'd']", "labels": "0"},
    ],
    "arc": [
        {"question": "one", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"question": "two", "choices": {"text": ["b", "d"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_retrieval(tmp_path: Path, form: str) -> None:
    data = LocalData(write_folder(tmp_path / form, {"default": {"test": FORMS[form]}}))
    assert layout_of(data) == "Choices"
    content, own = load_choices(data)
    assert content.queries == {"q0": "one", "q1": "two"}
    assert content.corpus.to_pylist() == [{"id": f"c{n}", "title": "", "text": text} for n, text in enumerate("abcd")]
    assert content.relevant == {"q0": {"c2": 1}, "q1": {"c1": 1}}
    assert own == [["c0", "c1", "c2"], ["c1", "c3"]]
    task = local_task(data.folder)
    assert (task.metadata.type, task.metadata.main_score, task.metadata.name) == ("Retrieval", "ndcg_at_10", form)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": "['a', __import__('os')]"}, r"row 1: its choices are no list: "),
        ({"choices": "['a'"}, "its choices are no list"),
        ({"choices": "['a']"}, "must be two texts or more"),
        ({"choices": "{'a': 1}"}, "must be two texts or more"),
        ({"answer": "2"}, "its answer '2' is not one of its 2 choices, which count from 0"),
        ({"answer": "-1"}, "its answer '-1' is not one of its 2 choices"),
        ({"answer": "B"}, "its answer 'B' must be the position of the right choice, from 0"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"question": "q", "choices": "['a', 'b']", "answer": "0"}
    data = LocalData(write_folder(tmp_path / "bad", {"default": {"test": [good, good | row]}}))
    with pytest.raises(EvaluationError, match=message) as caught:
        load_choices(data)
    assert str(data.folder) in str(caught.value)


def test_a_label_that_is_no_choice_is_named(tmp_path: Path) -> None:
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"}
    with pytest.raises(EvaluationError, match=r"its answer 'E' is none of the labels \['A', 'B'\]"):
        load_choices(LocalData(write_folder(tmp_path / "bad", {"default": {"test": [row]}})))


def test_columns_are_recognised_by_their_names() -> None:
    assert choice_columns(["id", "query", "options", "label"]) == ChoiceColumns("query", "options", "label")
    assert choice_columns(["question", "answer"]) is None


def test_accuracy_among_own_choices_by_hand() -> None:
    own = {"first": ["a", "b"], "tie": ["a", "b"], "lost": ["a", "b"], "none": ["a", "b"], "alone": ["a", "b"]}
    relevant = {query: {"a": 1} for query in own}
    results = {
        "first": {"a": 0.5, "b": 0.4, "x": 0.9},
        "tie": {"a": 0.5, "b": 0.5},
        "lost": {"b": 0.1},  # its right choice was not among the found
        "none": {"x": 0.1},
        "alone": {"a": 0.1},
    }
    assert choice_accuracy(own, relevant, results) == 2 / 5
