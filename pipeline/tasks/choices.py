"""Questions with choices, one of which is right, in the forms in which they are published.

| column   | other names                          | form                                                            |
|----------|--------------------------------------|-----------------------------------------------------------------|
| question | query, queries                       | text                                                            |
| choices  | options, documents                   | list of texts, also written out as in Python ("['a', 'b']"), or |
|          |                                      | a record of two lists, `text` and `label` (ARC's own files)     |
| answer   | answerKey, answer_index, label, labels | position of the right choice from 0, or its label where the   |
|          |                                      | choices have labels                                             |
"""

import ast
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.core.errors import EvaluationError

CHOICE_ACCURACY = "choice_accuracy"  # the name of that score in mteb's results

_QUESTION = ("question", "query", "queries")
_CHOICES = ("choices", "options", "documents")
_ANSWER = ("answer", "answerKey", "answer_index", "label", "labels")


class ChoiceColumns(NamedTuple):
    """How the columns are called in one data set; by default as they should be."""

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"


class Question(NamedTuple):
    """A question, its choices, and which of them is right (from 0)."""

    text: str
    choices: list[str]
    right: int


def choice_columns(columns: Collection[str]) -> ChoiceColumns | None:
    """The columns of questions with choices among `columns`; None if one of the three is not there."""
    found = [[name for name in names if name in columns][:1] for names in (_QUESTION, _CHOICES, _ANSWER)]
    return ChoiceColumns(*itertools.chain(*found)) if all(found) else None


def read_choices(table: pa.Table, columns: ChoiceColumns, *, where: str) -> list[Question]:
    """The questions of a table; raises EvaluationError with `where` and the row that cannot be read."""
    questions = []
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    for row, (text, choices, answer) in enumerate(rows):
        try:
            texts, labels = _choices(choices)
            questions.append(Question(str(text), texts, _right(answer, texts, labels)))
        except ValueError as error:
            raise EvaluationError(f"{where}: row {row}: {error}") from None
    return questions


def _choices(value: Any) -> tuple[list[str], list[str] | None]:
    """The choices and their labels."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"its choices are no list: {value[:60]!r}") from None
    if isinstance(value, Mapping) and {"text", "label"} <= set(value):
        texts, _ = _choices(value["text"])
        return texts, [str(label) for label in value["label"]]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise ValueError(f"its choices must be two texts or more: {str(value)[:60]}")
    return value, None


def _right(answer: Any, texts: Sequence[str], labels: Sequence[str] | None) -> int:
    if labels is not None:
        if str(answer) not in labels:
            raise ValueError(f"its answer {answer!r} is none of the labels {labels}")
        return labels.index(str(answer))
    try:
        position = int(answer)
    except (TypeError, ValueError):
        raise ValueError(f"its answer {answer!r} must be the position of the right choice, from 0") from None
    if not 0 <= position < len(texts):
        raise ValueError(f"its answer {answer!r} is not one of its {len(texts)} choices, which count from 0")
    return position


def choice_accuracy(
    own: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Mapping[str, int]],
    results: Mapping[str, Mapping[str, float]],
) -> float:
    """Share of questions whose right choice scores above each of their other choices; ties count against.

    Args:
        own: question -> ids of its choices.
        relevant: question -> its right choice.
        results: question -> scores of the passages that were found; what was not found is below all that was.
    """
    return sum(_is_right(own[query], relevant[query], found) for query, found in results.items()) / len(results)


def _is_right(choices: Sequence[str], relevant: Mapping[str, int], found: Mapping[str, float]) -> bool:
    right = max((found[choice] for choice in choices if choice in relevant and choice in found), default=None)
    if right is None:
        return False
    return all(found[choice] < right for choice in choices if choice not in relevant and choice in found)
