"""Embeddings whose first dimensions hold most of them, without training: `pipeline rotate MODEL --texts FILE`.

The embeddings of texts, at length 1, are turned by the directions of their second moments. No mean is taken away and
nothing is scaled, so that cosines stay as they are, and those of the first k dimensions are the best approximation of
rank k on these texts (Eckart and Young 1936).

An embedding is an affine map of a hidden state of d dimensions and spans d + 1 at most. What is wider, a reading beside
a prediction, loses the other dimensions, which hold nothing.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.core.errors import TrainingError
from pipeline.core.vectors import principal_components, unit_rows
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.folder.derive import derive, open_source
from pipeline.encoder.head import EmbeddingHead, Rotation

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.core.readers import TextFile
    from pipeline.encoder.inference import Encoder

CHUNK_ROWS = 1024
RANK = 1e-9
"""Share of the largest singular value of the map below which a direction is one that no embedding has."""


class Rotated(NamedTuple):
    """A rotation of k dimensions, and the share of the embeddings' squared length in each of them, `[k]`."""

    rotation: Rotation
    shares: np.ndarray

    def leading(self, count: int) -> float:
        """The share in the first `count` dimensions."""
        return float(self.shares[:count].sum())


def rotate(
    model: Path,
    encoder: "Encoder",
    texts: "TextFile",
    out: Path,
    *,
    instruction: str = "",
    dimensions: int | None = None,
) -> Rotated:
    """Write the encoder folder `model`, loaded as `encoder`, with rotated embeddings as `out`, which may be `model`.

    `instruction` stands before each of the texts that decide the rotation; None of `dimensions` keeps all.

    Raises:
        TrainingError: there are fewer dimensions, or an embedding is not finite.
        ArtifactError: `model` is missing or damaged, or `out` exists.
        SourceError: the texts are damaged.
    """
    source = open_source(model, out)
    truncated = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal truncated
        for chunk in texts.chunks(CHUNK_ROWS):
            embedded = encoder.embed(chunk, instruction=instruction)
            truncated += embedded.truncated
            yield embedded.vectors

    found = fit_rotation(encoder.head, blocks(), dimensions)
    encoder.config.warn_of_truncated(truncated, texts.rows)
    config: EncoderConfig = encoder.config.model_copy(update={"rotated_width": len(found.shares)})
    facts = {"texts": texts.rows, "instruction": instruction, "dimensions": dimensions}
    derive(source, out, config, {**source.manifest.params, "rotate": facts}, found.rotation)
    return found


def fit_rotation(head: EmbeddingHead, blocks: Iterable[np.ndarray], dimensions: int | None = None) -> Rotated:
    """The rotation of embeddings `[B, width]` of `head`, in blocks; its first `dimensions`, None: all that they span.

    Raises TrainingError if they span fewer.
    """
    weight, bias = (part.numpy() for part in head.composed())
    basis = _span(np.column_stack([weight, bias]))
    if dimensions is not None and not 1 <= dimensions <= basis.shape[1]:
        message = f"{dimensions}: embeddings of this encoder span {basis.shape[1]} dimensions, at least 1 must stay"
        raise TrainingError(message, argument="dimensions")
    moments = np.zeros((basis.shape[1],) * 2)
    for block in blocks:
        along = unit_rows(block.astype(np.float64)) @ basis
        moments += along.T @ along
    squares, directions = principal_components(moments)
    turn = (basis @ directions)[:, :dimensions]
    # The predicted response is the first part of an embedding; of one that is rotated already, what leads back to it.
    prediction = np.eye(head.student.width, head.width)
    if head.rotation is not None:
        prediction = head.rotation.prediction.cpu().numpy()
    maps = (turn.T @ weight, turn.T @ bias, prediction @ turn)
    return Rotated(Rotation(*map(_float32, maps)), (squares / squares.sum())[:dimensions])


def _span(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis `[W, r]` of the columns of `[W, d + 1]`."""
    basis, values, _ = np.linalg.svd(columns, full_matrices=False)
    return basis[:, values > RANK * values[0]]


def _float32(values: np.ndarray) -> "Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
