"""From a reading to the embedding: standardised, in closed form to the answers' targets, or both.

A share a of the embedding is the predicted response, 1 - a the standardised reading of the text itself:

    embedding = |r| [a p / |p|,  (1 - a) r / |r|]

p is the ridge regression of the target on the standardised reading r; |p| and |r| are mean lengths over the training
rows, so the map from the hidden states to the embedding stays affine. a = 1 is the paper's, a = 0 the reading alone.
r may be decorrelated before. In the form `added` both parts are summed. Targets that are readings of the backbone have
the dimensions of r, decorrelated as they are. Other teachers embed the queries too, and r is first mapped into their
space, by ridge regression of these embeddings on it.
The factor |r| in front plays no part in a cosine. A regularised classifier on the embeddings sees it: at unit length
mteb's few-shot classifier loses .03 to .10 of its accuracy (docs/results.md).
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.core.files import bytes_sha256, digest_of
from pipeline.core.target_transform import TransformParams
from pipeline.encoder.folder.config import ResponseForm
from pipeline.train.params import RefineParams
from pipeline.train.reading_map import decorrelation
from pipeline.train.refine import refine
from pipeline.train.ridge import LinearMap
from pipeline.train.states import States
from pipeline.train.warm_start import Statistics, closed_form

VERSION = 1  # raise it when the same numbers embed differently: finished scores are then not reused


@dataclass(frozen=True)
class Prediction:
    """The closed form from a standardised reading to the targets.

    Attributes:
        map: from `[N, d]` to `[N, e]`.
        ridge: its strength, chosen by how well left-out rows find their targets.
        length: mean length of its predictions over the training rows; `reading_length` and `target_length` likewise.
        refined: by contrast, see `pipeline.train.refine`.
        form: how a share below 1 and the reading are joined.
        reading_map: of readings to the targets' space, before they are added; `reading_length` is of what it gives.
    """

    map: LinearMap
    ridge: float
    length: float
    reading_length: float
    target_length: float
    refined: bool = False
    form: ResponseForm = "beside"
    reading_map: LinearMap | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) over its numbers."""
        maps = [self.map] if self.reading_map is None else [self.map, self.reading_map]
        parts = [part for each in maps for part in (each.weight, each.bias)]
        numbers = [bytes_sha256(np.ascontiguousarray(part).data) for part in parts]
        joined = [] if self.form == "beside" else [self.form]
        return digest_of([VERSION, *numbers, self.length, self.reading_length, *joined])

    def embed(self, readings: np.ndarray, share: float) -> np.ndarray:
        """Embeddings float32 of standardised readings `[N, d]`: `[N, e + d]`, or `[N, e]` at share 1 or added."""
        return self._joined(self.map(readings) / self.length, readings, share)

    def answers(self, targets: np.ndarray, readings: np.ndarray, share: float) -> np.ndarray:
        """Where the embeddings of queries should lie: targets `[N, e]` with the readings `[N, d]` of the answers."""
        return self._joined(targets / self.target_length, readings, share)

    def _joined(self, predicted: np.ndarray, readings: np.ndarray, share: float) -> np.ndarray:
        predicted = predicted * self.reading_length
        if share == 1:
            return predicted.astype(np.float32)
        own = readings if self.reading_map is None else self.reading_map(readings)
        parts = share * predicted, (1 - share) * own
        return (parts[0] + parts[1] if self.form == "added" else np.hstack(parts)).astype(np.float32)


def fit_prediction(
    readings: np.ndarray,
    targets: np.ndarray,
    form: ResponseForm = "beside",
    query_targets: np.ndarray | None = None,
    transform: TransformParams | None = None,
) -> Prediction:
    """The closed form on the training rows: standardised readings `[N, d]` and targets `[N, e]`.

    A reading that is added is mapped by ridge regression of `query_targets` `[N, e]`, the teacher's embeddings of the
    queries, on it. In either form it is else decorrelated by `transform`, or stays as it is.
    """
    fitted, ridge = _closed_form(readings, targets)
    reading_map = None
    if query_targets is not None:
        reading_map = _closed_form(readings, query_targets)[0]
    elif transform is not None:
        reading_map = decorrelation(readings, transform)
    own = readings if reading_map is None else reading_map(readings)
    lengths = (_mean_length(fitted(readings)), _mean_length(own), _mean_length(targets))
    return Prediction(fitted, ridge, *lengths, form=form, reading_map=reading_map)


def _closed_form(readings: np.ndarray, targets: np.ndarray) -> tuple[LinearMap, float]:
    statistics = Statistics(1, width := readings.shape[1])
    statistics.add(range(len(readings)), States.of(readings[:, None], 1), targets)
    return closed_form(statistics.folds(), LinearMap(np.eye(width), np.zeros(width)))


def refine_prediction(
    prediction: Prediction, readings: np.ndarray, targets: np.ndarray, params: RefineParams, seed: int, device: str
) -> Prediction:
    """The prediction refined on the rows that it was fitted on."""
    refined = refine(prediction.map, readings, targets, params, seed=seed, device=device)
    return replace(prediction, map=refined, length=_mean_length(refined(readings)), refined=True)


def _mean_length(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean())
