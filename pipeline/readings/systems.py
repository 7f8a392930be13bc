"""Readings as systems of an evaluation: as they are, standardised, decorrelated, and with the predicted response."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.target_transform import TargetTransform
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.readings.closed_form import Prediction
from pipeline.readings.states import READING_TEMPLATES, Pool
from pipeline.tasks.instructions import Side


@dataclass(frozen=True)
class ReadingEntry:
    """One pool of one template, in the words of a table."""

    template: str
    pool: Pool
    meaning: str


READINGS = {
    "backbone-mean": ReadingEntry("bare", "text", "mean over the bare text"),
    "backbone-last": ReadingEntry("bare", "last", "last token of the bare text"),
    "echo": ReadingEntry("echo", "text", "bare text twice, mean over the second"),
    "tokens": ReadingEntry("prompt", "tokens", "compression tokens after the student's prompt"),
    "prompt-text": ReadingEntry("prompt", "text", "mean over the text within the prompt"),
    "prompt-last": ReadingEntry("prompt", "last", "last token of the prompt"),
    "twice-tokens": ReadingEntry("prompt-twice", "tokens", "compression tokens, the text twice in the prompt"),
    "twice-text": ReadingEntry("prompt-twice", "text", "second text within the prompt"),
    "twice-both": ReadingEntry("prompt-twice", "both", "second text and compression tokens, one mean"),
}


RAW, STANDARDIZED, DECORRELATED = "raw", "standardized", "decorrelated"
CLOSED_FORM, REFINED = "closed form", "refined"


@dataclass(frozen=True)
class ReadingSystem:
    """A `System`: a reading, behind its standardisation and its closed form where they are given.

    Attributes:
        reading: a key of `READINGS`.
        states: of the reading's template, with their cache.
        share: of the predicted response; read where there is a prediction.
    """

    reading: str
    states: CachedSystem
    standardize: TargetTransform | None = None
    prediction: Prediction | None = None
    share: float = 1.0

    @property
    def kind(self) -> str:
        if self.prediction:
            return REFINED if self.prediction.refined else CLOSED_FORM
        if self.standardize is None:
            return RAW
        return STANDARDIZED if self.standardize.diagonal else DECORRELATED

    @property
    def name(self) -> str:
        if self.kind == RAW:
            return self.reading
        share = f"-{self.share:g}" if self.prediction else ""
        return f"{self.reading}-{self.kind.replace(' ', '-')}{share}"

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "states": self.states.identity,
            "pool": READINGS[self.reading].pool,
            "standardize": self.standardize.identity if self.standardize else None,
            "prediction": {"digest": self.prediction.digest, "share": self.share} if self.prediction else None,
        }

    @property
    def prompting(self) -> str:
        return self.states.prompting

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return self.states.cache_key(text, instruction, side)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Embeddings float32 `[len(texts), width]`."""
        readings = self.readings(texts, instruction, side)
        return self.prediction.embed(readings, self.share) if self.prediction else readings

    def readings(self, texts: Sequence[str], instruction: str = "", side: Side = "query") -> np.ndarray:
        """The reading alone, `[len(texts), d]`."""
        reading = READINGS[self.reading]
        pools = READING_TEMPLATES[reading.template].pools
        states = self.states.encode(texts, instruction, side)
        width = states.shape[1] // len(pools)
        found = states[:, pools.index(reading.pool) * width :][:, :width]
        return self.standardize(found) if self.standardize else found

    def answers(self, texts: Sequence[str], targets: np.ndarray | None) -> np.ndarray:
        """Where queries with these answers should lie: see `Prediction.answers`; without a prediction, the reading."""
        readings = self.readings(texts, side="document")
        if self.prediction is None or targets is None:
            return readings
        return self.prediction.answers(targets, readings, self.share)
