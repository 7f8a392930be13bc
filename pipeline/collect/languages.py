"""Which texts are in another language than those wanted, as py3langid tells them (139 languages, offline).

A text goes if its most likely language is not wanted and is, against the most likely wanted one, at least as sure as
`confidence`. Short texts, names, numbers and code give no such certainty and stay, and so does what the model takes for
no language at all (`zxx`).
"""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.collect.spill import Mask
from pipeline.core.errors import ParamsError

NO_LANGUAGE = "zxx"


def library() -> dict[str, Any]:
    """What determines the answers besides params."""
    return {"library": "py3langid", "version": version("py3langid")}


class LanguageFilter:
    """Tells texts of other languages."""

    def __init__(self, languages: Sequence[str], confidence: float) -> None:
        """Load the model.

        Args:
            languages: ISO 639 codes of the wanted languages.
            confidence: in (0.5, 1): how sure another language must be against the best wanted one.

        Raises:
            ParamsError: the model does not know one of the languages.
        """
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted(str(label) for label in self._model.labels)
        unknown = [language for language in languages if language not in known]
        if unknown:
            raise ParamsError(
                f"collect.languages: the model does not know {', '.join(unknown)} (it knows {', '.join(known)})"
            )
        self._wanted = {*languages, NO_LANGUAGE}
        self._confidence = confidence

    def others(self, texts: Iterable[str]) -> Mask:
        """Which of the texts are in another language: bool [N]."""
        return np.array([self._is_other(text) for text in texts], dtype=bool)

    def _is_other(self, text: str) -> bool:
        if self._model.classify(text)[0] in self._wanted:
            return False
        ranked = self._model.rank(text)
        other = ranked[0][1]
        wanted = next(probability for language, probability in ranked if language in self._wanted)
        return bool(other >= self._confidence * (other + wanted))
