"""Training rows: queries, responses and targets joined by id, tokenised once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.answers import ends_in_loop
from pipeline.backbone import PromptFormatter, eos_token_id
from pipeline.encoder.losses import Batch
from pipeline.errors import TrainingError


@dataclass(frozen=True)
class TrainingRows:
    """N rows, aligned: prompt ids, response ids (EOS included) and targets float32 `[N, e]`."""

    query_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def width(self) -> int:
        """e, dimensions of a target."""
        return int(self.targets.shape[1])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of one forward pass."""
        return Batch(
            [self.query_ids[row] for row in rows],
            [self.response_ids[row] for row in rows],
            torch.from_numpy(self.targets[list(rows)]),
        )


def join(queries: pa.Table, responses: pa.Table, targets: pa.Table) -> pa.Table:
    """Rows of `queries` that have a target, with their response; sorted by id.

    Raises:
        TrainingError: not one query has a target.
    """
    kept = queries.filter(pc.is_in(queries["id"], targets["id"]))
    if not kept.num_rows:
        raise TrainingError(f"none of {queries.num_rows} queries has a target: run generate and embed again")
    return (
        kept.append_column("response", _lookup(responses, kept["id"], "response"))
        .append_column("finish_reason", _lookup(responses, kept["id"], "finish_reason"))
        .append_column("embedding", _lookup(targets, kept["id"], "embedding"))
    )


def drop_loops(table: pa.Table) -> pa.Table:
    """A joined table without the rows whose response ends in a repetition loop (`answers.ends_in_loop`).

    Raises:
        TrainingError: no row is left.
    """
    kept = table.filter(pa.array([not ends_in_loop(text) for text in table["response"].to_pylist()], pa.bool_()))
    if not kept.num_rows:
        raise TrainingError(f"train.drop_loops: all {table.num_rows} responses end in a repetition loop")
    return kept


def _lookup(table: pa.Table, ids: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    return table.column(column).take(pc.index_in(ids, table["id"].combine_chunks()))


def embeddings_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed_size_list column as float32 `[N, e]`."""
    array = column.combine_chunks()
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(len(array), -1), dtype=np.float32)


def tokenize(
    table: pa.Table, formatter: PromptFormatter, tokenizer: PreTrainedTokenizerBase, max_response_tokens: int
) -> TrainingRows:
    """Tokenise a joined table.

    A response ends with EOS only where the model itself stopped: one that was cut has no end to predict.
    """
    query_ids = [formatter(text).token_ids for text in table["text"].to_pylist()]
    eos = eos_token_id(tokenizer)
    response_ids = [
        _with_end(ids, eos, finish == "stop", max_response_tokens)
        for ids, finish in zip(
            tokenizer(table["response"].to_pylist(), add_special_tokens=False)["input_ids"],
            table["finish_reason"].to_pylist(),
            strict=True,
        )
    ]
    return TrainingRows(query_ids, response_ids, embeddings_matrix(table["embedding"]))


def _with_end(ids: Sequence[int], eos: int, finished: bool, limit: int) -> list[int]:
    if finished and len(ids) < limit:
        return [*ids, eos]
    return list(ids[:limit])


def epoch_order(rows: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of the rows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps(rows: int, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> Iterator[list[int]]:
    """Row indices of each optimiser step; the last batch of an epoch may be smaller."""
    taken = 0
    for epoch in range(epochs):
        order = epoch_order(rows, epoch, seed)
        for start in range(0, rows, batch_size):
            if max_steps is not None and taken == max_steps:
                return
            yield order[start : start + batch_size].tolist()
            taken += 1
