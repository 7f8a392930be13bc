"""What embeddings encode, as a table: decoded text, vocabulary, nearest known texts, and cosines to judge them by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.errors import EvaluationError, TrainingError
from pipeline.lens.decoding import Decoder
from pipeline.lens.faithfulness import PairCosines, Summary, pair, summary
from pipeline.lens.nearest import Index, nearest
from pipeline.lens.vocabulary import words_of

if TYPE_CHECKING:
    from pipeline.core.bootstrap import BootstrapParams
    from pipeline.encoder.inference import Encoder

Array = np.ndarray[Any, Any]

_WORDS = pa.list_(pa.struct([("word", pa.string()), ("probability", pa.float32())]))
_NEAR = pa.list_(pa.struct([("id", pa.string()), ("cosine", pa.float32()), ("text", pa.string())]))
_COSINES = ("cosine_embedding", "chance_embedding", "cosine_response", "chance_response")

# Cosines of the decoded text in the teacher's space: to the student's embedding and the real response of the row
# ("cosine"), and the mean over those of all other rows ("chance").
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


class EncoderOutputs(NamedTuple):
    """Outputs for B texts: hidden states `[B, n, d]` if known, soft prompts `[B, n, d]`, embeddings `[B, e]`.

    At a response share below 1, `embeddings` are the predicted responses alone, which lie in the teacher's space.
    """

    hidden: Array | None
    soft_prompts: Array
    embeddings: Array


def outputs_for_texts(encoder: "Encoder", texts: Sequence[str], instruction: str = "") -> EncoderOutputs:
    """All three outputs from one forward pass."""
    import torch

    states = encoder.states(texts, instruction=instruction)
    with torch.inference_mode():
        found = encoder.student(torch.from_numpy(states).to(encoder.model.device))
    soft, embeddings = (part.float().cpu().numpy() for part in found)
    return EncoderOutputs(states[:, -encoder.student.compression_tokens :], soft, embeddings)


def outputs_for_soft_prompts(encoder: "Encoder", soft_prompts: Array) -> EncoderOutputs:
    """The embeddings of stored soft prompts float32 `[B, n, d]`, whose hidden states are not known.

    Raises TrainingError if embeddings are not made of soft prompts.
    """
    import torch

    if encoder.config.pool != "tokens":
        raise TrainingError(f"embeddings of this encoder (pool: {encoder.config.pool}) need the texts: give these")
    with torch.inference_mode():
        soft = torch.from_numpy(soft_prompts).to(encoder.model.device)
        return EncoderOutputs(None, soft_prompts, encoder.student.embedding(soft).float().cpu().numpy())


class Entries(NamedTuple):
    """What is known of the texts; None: unknown."""

    ids: Sequence[str]
    queries: Sequence[str | None]
    responses: Sequence[str | None]


@dataclass(frozen=True)
class Lens:
    """What is read of an encoder's embeddings: `vocabulary` words per compression token, `count` texts of `index`."""

    encoder: "Encoder"
    decoder: Decoder
    vocabulary: int = 8
    index: Index | None = None
    count: int = 5

    def read(self, entries: Entries, outputs: EncoderOutputs) -> pa.Table:
        """Rows of schema `ROWS` without cosines, which `add_cosines` fills in."""
        nulls = [None] * len(entries.ids)
        columns: dict[str, Any] = dict.fromkeys(_COSINES, nulls)
        columns |= {"id": entries.ids, "query": entries.queries, "response": entries.responses}
        columns["decoded"] = self.decoder(outputs.soft_prompts)
        columns["vocabulary"] = self._vocabulary(outputs) or nulls
        columns["nearest"] = self.nearest(outputs.embeddings) if self.searches else nulls
        return pa.table(columns, schema=ROWS)

    def _vocabulary(self, outputs: EncoderOutputs) -> list[Any]:
        if outputs.hidden is None or not self.vocabulary:
            return []
        found = words_of(self.encoder, outputs.hidden, self.vocabulary)
        return [[[word._asdict() for word in token] for token in row] for row in found]

    @property
    def searches(self) -> bool:
        """Whether nearest texts are looked up."""
        return self.index is not None and self.count > 0

    def nearest(self, embeddings: Array) -> pa.Array:
        """The column `nearest` of embeddings `[N, e]`, from one pass through the index."""
        if self.index is None:
            return pa.nulls(len(embeddings), _NEAR)
        found = nearest(embeddings, self.index, self.count)
        return pa.array([[neighbour._asdict() for neighbour in row] for row in found], _NEAR)


def add_cosines(rows: pa.Table, embeddings: Array, embed: Callable[[Sequence[str]], Array]) -> pa.Table:
    """The rows of `Lens.read` with their cosines; those to the response only where there is one.

    `embeddings` are the student's `[N, e]`, `embed` is the teacher: texts in, vectors `[N, e]` out. Raises
    EvaluationError if its vectors have another width, so the student was trained with another teacher.
    """
    decoded = embed(rows["decoded"].to_pylist())
    if decoded.shape[1] != embeddings.shape[1]:
        widths = f"{decoded.shape[1]} dimensions, the encoder was trained for one of {embeddings.shape[1]}"
        raise EvaluationError(f"it gives vectors of {widths}: name the recorded one", argument="teacher")
    rows = _set_cosines(rows, "embedding", pair(decoded, embeddings), range(rows.num_rows))
    responses = rows["response"].to_pylist()
    answered = [row for row, response in enumerate(responses) if response is not None]
    if not answered:
        return rows
    response_vectors = embed([responses[row] for row in answered])
    return _set_cosines(rows, "response", pair(decoded[answered], response_vectors), answered)


def _set_cosines(rows: pa.Table, counterpart: str, pairs: PairCosines, at: Sequence[int]) -> pa.Table:
    for name, values in ((f"cosine_{counterpart}", pairs.own), (f"chance_{counterpart}", pairs.chance)):
        column = np.full(rows.num_rows, np.nan, np.float32)
        column[list(at)] = values
        array = pa.array(column, pa.float32(), from_pandas=True)  # NaN becomes null
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), array)
    return rows


def pair_cosines(rows: pa.Table) -> dict[str, PairCosines]:
    """The cosines of rows by their counterpart, "embedding" or "response", where there are any."""
    found = {}
    for counterpart in ("embedding", "response"):
        own, chance = (rows[f"{name}_{counterpart}"].to_numpy() for name in ("cosine", "chance"))  # null becomes NaN
        known = np.isfinite(own)
        if known.any():
            found[counterpart] = PairCosines(own[known], chance[known])
    return found


def summaries(rows: pa.Table, settings: "BootstrapParams") -> dict[str, Summary]:
    """Of the cosines by their counterpart, "embedding" or "response", where there are any."""
    return {name: summary(f"cosine_{name}", pairs, settings) for name, pairs in pair_cosines(rows).items()}
