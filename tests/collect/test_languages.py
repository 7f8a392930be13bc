"""The language filter: sure of long texts, silent about short ones."""

import pytest

from pipeline.collect.languages import LanguageFilter, library
from pipeline.core.errors import ParamsError


@pytest.fixture(scope="module")
def english() -> LanguageFilter:
    return LanguageFilter(["en"], 0.99)


@pytest.mark.parametrize(
    "text",
    [
        "Quelle est la capitale de la France et combien d'habitants compte-t-elle ?",
        "Wie lange dauert es, ein Ei zu kochen?",
        "ما هي عاصمة فرنسا؟",
        "日本の首都はどこですか",
    ],
)
def test_other_languages_go(english: LanguageFilter, text: str) -> None:
    assert english.unwanted([text]).tolist() == [True]


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France, and how many people live there?",
        "ok",
        "Tokyo",
        "2+2=?",
        "Explain quantum computing.",
        "def f(x): return x + 1",
        'Translate "Où sont les toilettes ?" to English',
        "",
    ],
)
def test_english_and_what_is_too_short_to_tell_stay(english: LanguageFilter, text: str) -> None:
    assert english.unwanted([text]).tolist() == [False]


def test_several_languages() -> None:
    wanted = LanguageFilter(["de", "en"], 0.99)
    texts = [
        "Wie lange dauert es, ein Ei zu kochen?",
        "How long does an egg take?",
        "Combien de temps faut-il attendre ?",
    ]
    assert wanted.unwanted(texts).tolist() == [False, False, True]


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"^languages: the model does not know xx, english \(it knows ace, af"):
        LanguageFilter(["en", "xx", "english"], 0.9)


def test_the_model_is_named() -> None:
    assert library()["library"] == "py3langid"
