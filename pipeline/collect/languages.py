"""Texts in an unwanted language, as py3langid classifies them (139 languages, offline).

A text is dropped if its most likely language is unwanted and at least `confidence` likely against the best wanted one.
Short texts, names, numbers and code are never that certain and stay, as does text that is no language at all (`zxx`).
"""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.collect.spill import Mask
from pipeline.core.errors import ParamsError

NO_LANGUAGE = "zxx"


def library() -> dict[str, Any]:
    """What decides the languages found besides the text, for a manifest."""
    return {"library": "py3langid", "version": version("py3langid")}


class LanguageFilter:
    """Finds texts that are surely in another language than the wanted ones."""

    def __init__(self, languages: Sequence[str], confidence: float) -> None:
        """Load the model.

        `confidence` is the probability of an unwanted language against the best wanted one (ISO 639 codes), in (0.5,
        1). Raises ParamsError if the model does not know one of `languages`.
        """
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted(str(label) for label in self._model.labels)
        unknown = [language for language in languages if language not in known]
        if unknown:
            message = f"the model does not know {', '.join(unknown)} (it knows {', '.join(known)})"
            raise ParamsError(message, argument="languages")
        self._wanted = {*languages, NO_LANGUAGE}
        self._confidence = confidence

    def unwanted(self, texts: Iterable[str]) -> Mask:
        """Which of the texts are in an unwanted language: bool [N]."""
        return np.array([self._is_unwanted(text) for text in texts], dtype=bool)

    def _is_unwanted(self, text: str) -> bool:
        if self._model.classify(text)[0] in self._wanted:
            return False
        ranked = self._model.rank(text)
        best = ranked[0][1]
        wanted = next(probability for language, probability in ranked if language in self._wanted)
        return bool(best >= self._confidence * (best + wanted))
