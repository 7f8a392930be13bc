"""Initial rows of the new tokens.

vocabulary  copies of random vocabulary rows: inputs that the backbone knows, and all different
random      drawn from a normal with the mean and covariance of the vocabulary, as transformers does for added tokens
mean        that normal with 1e-9 of its covariance, in effect the mean row: a factor in the code of transformers, with
            which the paper's reference implementation starts its tokens
words       rows of the tokens of a given text
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import model_validator

from pipeline.backbone.device import exact_dtype
from pipeline.core.config import Params
from pipeline.core.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

TokenInitKind = Literal["vocabulary", "random", "mean", "words"]

# Of the covariance, in transformers' `resize_token_embeddings(mean_resizing=True)`.
SHRUNK = 1e-9
_CHUNK = 16_384


class TokenInitParams(Params):
    """The initial rows of the new tokens (`train.token_start`)."""

    kind: TokenInitKind = "vocabulary"
    words: str | None = None

    @model_validator(mode="after")
    def _only_kind_words_has_words(self) -> Self:
        if (self.words is not None) != (self.kind == "words"):
            raise ValueError(f"words {self.words!r} with kind {self.kind}: kind words, and no other, needs words")
        return self


class TokenInit(Protocol):
    """Gives the new tokens their initial rows."""

    def __call__(self, embeddings: Any, count: int, seed: int) -> "Tensor":
        """Rows float32 `[count, d]` on the device of `embeddings`; `seed` gives the same on every device.

        `embeddings` is the backbone's input embedding layer. It is called, and its weight not read, because some
        architectures (Gemma) scale the rows.
        """
        ...


def token_init(kind: TokenInitKind, words: str | None, tokenizer: Any) -> TokenInit:
    """The initialisation of a kind; TrainingError if `words` gives no token."""
    match kind:
        case "vocabulary":
            return vocabulary_rows
        case "random":
            return NormalRows()
        case "mean":
            return NormalRows(covariance=SHRUNK)
        case "words":
            ids = tokenizer(words or "", add_special_tokens=False)["input_ids"]
            if not ids:
                raise TrainingError(f"{words!r} gives 0 tokens, at least 1 is needed", argument="words")
            return WordRows(tuple(ids))


def vocabulary_rows(embeddings: Any, count: int, seed: int) -> "Tensor":
    """A `TokenInit`: different random vocabulary rows.

    They have the mean and the spread of the vocabulary and differ from each other: identical tokens would receive
    nearly identical gradients. Before the closed form they beat the mean embedding (docs/results-log.md).
    """
    import torch

    drawn = torch.randperm(_size(embeddings), generator=torch.Generator().manual_seed(seed))[:count]
    return _rows(embeddings, drawn)


@dataclass(frozen=True)
class NormalRows:
    """A `TokenInit`: a normal with the mean and `covariance` times the covariance of the vocabulary.

    Drawn as the sum of the V centred rows with standard normal weights, over the root of V: that costs count x V x d,
    and works where the covariance matrix is singular.
    """

    covariance: float = 1.0

    def __call__(self, embeddings: Any, count: int, seed: int) -> "Tensor":
        import torch

        size, device = _size(embeddings), embeddings.weight.device
        sums = [rows.sum(0, dtype=exact_dtype(device)) for _, rows in _chunks(embeddings)]
        mean = (torch.stack(sums).sum(0) / size).float()
        weights = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
        drawn = torch.zeros(count, len(mean), device=device)
        for at, rows in _chunks(embeddings):
            drawn += weights[:, at].to(device) @ (rows - mean)
        return mean + drawn * math.sqrt(self.covariance / size)


@dataclass(frozen=True)
class WordRows:
    """A `TokenInit`: rows of these tokens in their order, repeated if they are too few; nothing is drawn.

    If they are too many, each row is the mean of a run of neighbours.
    """

    ids: tuple[int, ...]

    def __call__(self, embeddings: Any, count: int, seed: int) -> "Tensor":
        import torch

        repeated = self.ids * math.ceil(count / len(self.ids))
        ids = torch.tensor(repeated[:count] if len(self.ids) < count else self.ids)
        return torch.stack([run.mean(0) for run in _rows(embeddings, ids).tensor_split(count)])


def _size(embeddings: Any) -> int:
    return int(embeddings.weight.shape[0])


def _rows(embeddings: Any, ids: "Tensor") -> "Tensor":
    return embeddings(ids.to(embeddings.weight.device)).detach().float()


def _chunks(embeddings: Any) -> "Iterator[tuple[slice, Tensor]]":
    import torch

    # In float32 a whole vocabulary of a large model would take gigabytes.
    for start in range(0, _size(embeddings), _CHUNK):
        at = slice(start, min(start + _CHUNK, _size(embeddings)))
        yield at, _rows(embeddings, torch.arange(at.start, at.stop))
