"""What embeddings hold, as rows of a table: decoded text, words, nearest known texts, and cosines to judge them by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.errors import EvaluationError
from pipeline.lens.decoding import Decoder
from pipeline.lens.faithfulness import Paired, Summary, pair, summary
from pipeline.lens.nearest import Index, nearest
from pipeline.lens.vocabulary import words_of

if TYPE_CHECKING:
    from pipeline.core.bootstrap import BootstrapParams
    from pipeline.encoder.inference import Encoder

Array = np.ndarray[Any, Any]

_WORDS = pa.list_(pa.struct([("word", pa.string()), ("probability", pa.float32())]))
_NEAR = pa.list_(pa.struct([("id", pa.string()), ("cosine", pa.float32()), ("text", pa.string())]))
_COSINES = ("cosine_embedding", "chance_embedding", "cosine_response", "chance_response")

# In the teacher's space, of the decoded text: its cosine to the student's embedding and to the real response, and the
# same with the other rows' embeddings and responses on average.
ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("response", pa.string()),
        ("decoded", pa.string()),
        *((name, pa.float32()) for name in _COSINES),
        ("vocabulary", pa.list_(_WORDS)),  # of each compression token, best first
        ("nearest", _NEAR),  # best first
    ]
)


class Held(NamedTuple):
    """What an encoder makes of B texts: hidden states `[B, n, d]` if known, soft prompts, embeddings `[B, e]`."""

    hidden: Array | None
    soft_prompts: Array
    embeddings: Array


def held_by(encoder: "Encoder", texts: Sequence[str], instruction: str = "") -> Held:
    """All three from one pass."""
    import torch

    hidden = encoder.hidden_states(texts, instruction=instruction)
    with torch.inference_mode():
        soft = encoder.student.soft_prompts(torch.from_numpy(hidden).to(encoder.model.device))
        return Held(hidden, soft.float().cpu().numpy(), encoder.student.embedding(soft).float().cpu().numpy())


def held_in(encoder: "Encoder", soft_prompts: Array) -> Held:
    """Of stored soft prompts float32 `[B, n, d]`: what they were made of is not known."""
    import torch

    with torch.inference_mode():
        soft = torch.from_numpy(soft_prompts).to(encoder.model.device)
        return Held(None, soft_prompts, encoder.student.embedding(soft).float().cpu().numpy())


class Entries(NamedTuple):
    """What is known of the texts beside their embeddings; None where it is not."""

    ids: Sequence[str]
    queries: Sequence[str | None]
    responses: Sequence[str | None]


@dataclass(frozen=True)
class Lens:
    """How embeddings are read.

    Attributes:
        encoder: whose they are.
        decoder: soft prompts to text.
        vocabulary: words a compression token; 0: none.
        index: known texts to find the nearest among; None: none.
        count: of nearest texts.
    """

    encoder: "Encoder"
    decoder: Decoder
    vocabulary: int = 8
    index: Index | None = None
    count: int = 5

    def read(self, entries: Entries, held: Held) -> pa.Table:
        """Rows by the schema `ROWS`, whose cosines `measured` fills in."""
        nothing = [None] * len(entries.ids)
        columns: dict[str, Any] = dict.fromkeys(_COSINES, nothing)
        columns |= {"id": entries.ids, "query": entries.queries, "response": entries.responses}
        columns["decoded"] = self.decoder(held.soft_prompts)
        columns["vocabulary"] = self._vocabulary(held) or nothing
        columns["nearest"] = self.near(held.embeddings) if self.searches else nothing
        return pa.table(columns, schema=ROWS)

    def _vocabulary(self, held: Held) -> list[Any]:
        if held.hidden is None or not self.vocabulary:
            return []
        found = words_of(self.encoder, held.hidden, self.vocabulary)
        return [[[word._asdict() for word in token] for token in row] for row in found]

    @property
    def searches(self) -> bool:
        """Whether there is anything to find."""
        return self.index is not None and self.count > 0

    def near(self, embeddings: Array) -> pa.Array:
        """The column `nearest` of embeddings `[N, e]`, from one pass through the index."""
        if self.index is None:
            return pa.nulls(len(embeddings), _NEAR)
        found = nearest(embeddings, self.index, self.count)
        return pa.array([[near._asdict() for near in row] for row in found], _NEAR)


def measured(rows: pa.Table, embeddings: Array, embed: Callable[[Sequence[str]], Array]) -> pa.Table:
    """The rows with their cosines; those to the response only where there is one.

    Args:
        rows: as `Lens.read` makes them.
        embeddings: the student's `[N, e]`, of the same rows.
        embed: the teacher: texts in, vectors `[N, e]` out.

    Raises:
        EvaluationError: the teacher's vectors are of another width, so it is not the one of the training.
    """
    decoded = embed(rows["decoded"].to_pylist())
    if decoded.shape[1] != embeddings.shape[1]:
        raise EvaluationError(
            f"embed.teacher gives vectors of {decoded.shape[1]} dimensions, the encoder was trained for one of "
            f"{embeddings.shape[1]}: name the teacher that it was trained with"
        )
    rows = _with(rows, "embedding", pair(decoded, embeddings), range(rows.num_rows))
    responses = rows["response"].to_pylist()
    answered = [row for row, response in enumerate(responses) if response is not None]
    if not answered:
        return rows
    real = embed([responses[row] for row in answered])
    return _with(rows, "response", pair(decoded[answered], real), answered)


def _with(rows: pa.Table, what: str, pairs: Paired, at: Sequence[int]) -> pa.Table:
    for name, values in ((f"cosine_{what}", pairs.own), (f"chance_{what}", pairs.chance)):
        column = np.full(rows.num_rows, np.nan, np.float32)
        column[list(at)] = values
        array = pa.array(column, pa.float32(), from_pandas=True)  # NaN becomes null
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), array)
    return rows


def pairs_in(rows: pa.Table, what: str) -> Paired | None:
    """The cosines to `what` ("embedding" or "response") that rows hold; None if none."""
    own, chance = (rows[f"{name}_{what}"].to_numpy() for name in ("cosine", "chance"))  # null becomes NaN
    there = np.isfinite(own)
    return Paired(own[there], chance[there]) if there.any() else None


def summaries(rows: pa.Table, settings: "BootstrapParams") -> dict[str, Summary]:
    """Of both cosines, by what they are to; without those that the rows do not hold."""
    found = {what: pairs_in(rows, what) for what in ("embedding", "response")}
    return {what: summary(f"cosine_{what}", pairs, settings) for what, pairs in found.items() if pairs is not None}
