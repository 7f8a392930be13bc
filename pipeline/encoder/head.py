"""Hidden states to embeddings: the predicted response, the student's own reading of the text, or both.

The paper's embedding is the predicted response alone, a *response share* of 1. At a share a below 1

    embedding = L_r [a / L_p  x  prediction,  (1 - a) / L_r  x  reading]

- prediction: `Student.embedding`, `[e]`
- reading: the mean hidden state over the compression tokens, or what else is pooled, each dimension standardised over
  training queries, `[d]`
- L_p, L_r: their mean lengths over these queries, so that both parts have one mean length

The inner product of two embeddings is then a^2 times that of the predictions plus (1 - a)^2 times that of the readings.
A map may decorrelate the reading; L_r is then the mean length of what it gives. In the form `added` the two are
summed, `[e]`. Targets that are a reading of the backbone have the reading's space, where they are decorrelated the
decorrelated reading's. For others the reading is first mapped into theirs, by the closed form to the teacher's
embeddings of the queries.
L_r in front changes no cosine, but classifiers with regularisation see the length. The map from the mean hidden state
stays affine, so every export can carry it. `pipeline readings` measures this form before training.

A `Rotation` turns the embedding, so that its first dimensions hold most of it. Together with the map before it, it is
one affine map of the mean hidden state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.encoder.folder.config import ResponseForm, embedding_width
from pipeline.encoder.student import Student

LEAST_VARIANCE = 1e-9
"""Share of the largest variance below which a dimension of the reading is left at 0."""


@dataclass(frozen=True)
class Reading:
    """How a student's own hidden states become an embedding, fitted on training queries; float32.

    Attributes:
        mean: of the mean hidden state over the compression tokens, `[d]`.
        scale: one over its standard deviation, `[d]`; 0 where it does not vary.
        lengths: mean length of predictions and of standardised readings, `[2]`; with a map also of mapped ones, `[3]`.
        weight: of the map that decorrelates standardised readings, or takes them to the targets' space, `[e, d]`; None
            without one.
        bias: of the map, `[e]`.
    """

    mean: Tensor
    scale: Tensor
    lengths: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def fit(cls, student: Student, features: Tensor) -> Self:
        """Of mean hidden states `[N, d]`, N at least 2."""
        features = features.cpu().double()
        variance, mean = torch.var_mean(features, dim=0, correction=0)
        varies = variance > LEAST_VARIANCE * variance.max()
        scale = torch.where(varies, variance.clamp(min=torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)
        weight, bias = composed(student)
        lengths = [(features @ weight.T + bias).norm(dim=1).mean(), ((features - mean) * scale).norm(dim=1).mean()]
        # Of equal rows both lengths may be 0; nothing is then divided by it.
        return cls(mean.float(), scale.float(), torch.stack(lengths).clamp(min=1e-9).float())

    @classmethod
    def plain(cls, hidden: int) -> Self:
        """Of `hidden` dimensions, which leaves hidden states as they are."""
        return cls(torch.zeros(hidden), torch.ones(hidden), torch.ones(2))

    @property
    def to_targets(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the map, if there is one."""
        return None if self.weight is None or self.bias is None else (self.weight, self.bias)

    def standardized(self, features: Tensor) -> Tensor:
        """Of mean hidden states `[N, d]`, float64 on the CPU."""
        return (features.cpu().double() - self.mean.cpu().double()) * self.scale.cpu().double()

    def with_map(self, weight: Tensor, bias: Tensor, features: Tensor) -> "Reading":
        """With a map to the targets' space, float64 on the CPU; the mean length of what it gives is over `features`."""
        length = (self.standardized(features) @ weight.T + bias).norm(dim=1).mean().clamp(min=1e-9)
        lengths = torch.cat([self.lengths, length[None].float()])
        return replace(self, lengths=lengths, weight=weight.float(), bias=bias.float())

    def tensors(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return {name: value.cpu().contiguous() for name, value in self._parts()}

    def to(self, device: Any) -> "Reading":
        return Reading(**{name: value.to(device) for name, value in self._parts()})

    def _parts(self) -> list[tuple[str, Tensor]]:
        found = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return [(name, value) for name, value in found if value is not None]


@dataclass(frozen=True)
class Rotation:
    """How a mean hidden state becomes a rotated embedding of k dimensions; float32.

    Attributes:
        weight: of the mean hidden state over the compression tokens, `[k, d]`.
        bias: `[k]`.
        prediction: from a rotated embedding back to the predicted response in it, `[e, k]`.
    """

    weight: Tensor
    bias: Tensor
    prediction: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return {each.name: getattr(self, each.name).cpu().contiguous() for each in fields(self)}

    def to(self, device: Any) -> "Rotation":
        return Rotation(*(getattr(self, each.name).to(device) for each in fields(self)))


@torch.no_grad()
def composed(student: Student) -> tuple[Tensor, Tensor]:
    """Weight `[e, d]` and bias `[e]` of both projections as one, float64 on the CPU: not every device has float64."""
    first, second = student.reconstruction, student.alignment
    outer, inner = second.weight.cpu().double(), first.weight.cpu().double()
    return outer @ inner, outer @ first.bias.cpu().double() + second.bias.cpu().double()


class EmbeddingHead:
    """Hidden states `[B, n, d]` at the compression tokens to embeddings `[B, width]`; see the module."""

    def __init__(
        self,
        student: Student,
        share: float = 1.0,
        reading: Reading | None = None,
        rotation: Rotation | None = None,
        form: ResponseForm = "beside",
        *,
        decorrelated: bool = False,
    ) -> None:
        """`share` of the predicted response, 0 to 1; below 1 it needs a `reading`, whose map may be `decorrelated`."""
        self.student, self.share, self.form = student, share, form
        self.rotation = rotation.to(student.tokens.device) if rotation is not None else None
        self._reading = reading.to(student.tokens.device) if reading is not None else Reading.plain(student.hidden)
        self._map = self._reading.to_targets if form == "added" or decorrelated else None
        prediction, own = (float(self._reading.lengths[at]) for at in (0, 1 if self._map is None else 2))
        self.prediction_scale = 1.0 if share == 1 else share * own / prediction
        self._reading_scale = self._reading.scale * (1 - share)

    @property
    def width(self) -> int:
        if self.rotation is not None:
            return len(self.rotation.bias)
        return embedding_width(self.share, self.student.width, self.student.hidden, self.form)

    def __call__(self, states: Tensor) -> Tensor:
        """`[B, width]` of states as `Student` takes them."""
        if self.rotation is not None:
            return self.student.feature(states) @ self.rotation.weight.T + self.rotation.bias
        if self.share == 1:
            return self._predicted(states)
        read = (self.student.feature(states) - self._reading.mean) * self._reading_scale
        if self.share == 0:
            return read
        if self._map is not None:
            weight, bias = self._map
            read = torch.addmm(bias * (1 - self.share), read, weight.T)
        return self._joined([self._predicted(states) * self.prediction_scale, read], dim=1)

    def _predicted(self, states: Tensor) -> Tensor:
        _, embeddings = self.student(states)
        return embeddings

    def predictions(self, embeddings: np.ndarray) -> np.ndarray:
        """The predicted responses `[N, e]` in embeddings `[N, width]`, at a share above 0 and not `added`."""
        if self.rotation is not None:
            embeddings = embeddings @ self.rotation.prediction.cpu().numpy().T
        return embeddings if self.share == 1 else embeddings[:, : self.student.width] / self.prediction_scale

    @torch.no_grad()
    def composed(self) -> tuple[Tensor, Tensor]:
        """Weight `[width, d]` and bias `[width]` of the map from the mean hidden state, float64 on the CPU."""
        if self.rotation is not None:
            return self.rotation.weight.cpu().double(), self.rotation.bias.cpu().double()
        weight, bias = composed(self.student)
        if self.share == 1:
            return weight, bias
        scale, mean = self._reading_scale.cpu().double(), self._reading.mean.cpu().double()
        parts = [(weight * self.prediction_scale, bias * self.prediction_scale)] if self.share > 0 else []
        read = torch.diag(scale), -scale * mean
        if self._map is not None:
            by, own = (part.cpu().double() for part in self._map)
            read = by @ read[0], by @ read[1] + own * (1 - self.share)
        parts.append(read)
        return self._joined([part for part, _ in parts], dim=0), self._joined([part for _, part in parts], dim=0)

    def _joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        return torch.stack(list(parts)).sum(0) if self.form == "added" else torch.cat(list(parts), dim=dim)
