"""Training rows: queries, responses and targets joined by id, checked, tokenised once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.prompting import PromptFormatter, eos_token_id
from pipeline.core.errors import TrainingError
from pipeline.core.vectors import matrix
from pipeline.generate.response_text import ends_in_loop
from pipeline.train.losses import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRows:
    """N rows, aligned: row ids, prompt ids, response ids (EOS included) and targets float32 `[N, e]`."""

    ids: Sequence[str]
    query_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def width(self) -> int:
        """e, dimensions of a target."""
        return int(self.targets.shape[1])

    def lengths(self, extra: int) -> np.ndarray:
        """Tokens `[N]` that each row sends through the backbone: query, response and `extra` others."""
        return np.array([query + response + extra for query, response in self.sizes(range(len(self)))])

    def sizes(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Query tokens and response tokens of these rows."""
        return [(len(self.query_ids[row]), len(self.response_ids[row])) for row in rows]

    def head(self, count: int) -> "TrainingRows":
        """The first `count` rows."""
        return TrainingRows(self.ids[:count], self.query_ids[:count], self.response_ids[:count], self.targets[:count])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of one forward pass."""
        return Batch(
            [self.query_ids[row] for row in rows],
            [self.response_ids[row] for row in rows],
            torch.from_numpy(self.targets[list(rows)]),
        )


def join(queries: pa.Table, responses: pa.Table, targets: pa.Table) -> pa.Table:
    """Rows of `queries` that have a target, with the columns response, finish_reason and embedding.

    A query whose response failed or is blank has no target by design and is left out. Raises TrainingError if no query
    has a target, or one with a usable response has none.
    """
    has_target = pc.is_in(queries["id"], targets["id"].combine_chunks())
    joined = queries.filter(has_target)
    if not joined.num_rows:
        raise TrainingError(f"none of {queries.num_rows} queries has a target: run generate and embed again")
    usable = pc.is_in(queries["id"], usable_ids(responses))
    without = queries.filter(pc.and_not(usable, has_target))
    _check_none(without["id"], "have a usable response but no target: run embed again")
    for table, columns in ((responses, ("response", "finish_reason")), (targets, ("embedding",))):
        rows = pc.index_in(joined["id"], table["id"].combine_chunks())
        for column in columns:
            joined = joined.append_column(column, table[column].take(rows))
    return joined


def usable_ids(responses: pa.Table) -> pa.Array:
    """Ids of the responses that embed takes: not failed, not blank."""
    blank = pc.equal(pc.utf8_trim_whitespace(responses["response"]), "")
    failed = pc.equal(responses["finish_reason"], "error")
    return responses["id"].filter(pc.invert(pc.or_(blank, failed))).combine_chunks()


def _check_none(ids: Sequence[str] | pa.ChunkedArray, problem: str, argument: str | None = None) -> None:
    """Raises TrainingError if there are queries with a problem."""
    if len(ids):
        shown = ", ".join(map(str, ids[:5]))
        message = f"{len(ids)} queries {problem} (ids {shown}{', ...' if len(ids) > 5 else ''})"
        raise TrainingError(message, argument=argument)


def drop_loops(table: pa.Table) -> pa.Table:
    """A joined table without the rows whose response ends in a loop; raises TrainingError if no row is left."""
    others = table.filter(pa.array([not ends_in_loop(text) for text in table["response"].to_pylist()], pa.bool_()))
    if not others.num_rows:
        raise TrainingError(f"all {table.num_rows} responses end in a repetition loop", argument="drop_loops")
    return others


def tokenize(
    table: pa.Table,
    formatter: PromptFormatter,
    tokenizer: PreTrainedTokenizerBase,
    max_response_tokens: int,
    long_responses: Literal["error", "cut"] = "error",
) -> TrainingRows:
    """Tokenise a joined table.

    A response ends with EOS only where the model itself stopped: one that was cut has no end to predict.

    Raises TrainingError if a response has no token, or is longer than `max_response_tokens` and may not be cut.
    """
    ids, limit = table["id"].to_pylist(), max_response_tokens
    prompts = formatter.batch(table["text"].to_pylist())
    responses = table["response"].to_pylist()
    answers = ControlTokens(tokenizer).encode(responses, add_special_tokens=False)["input_ids"]
    _check_none(
        [row for row, answer in zip(ids, answers, strict=True) if not answer], "have a response without a token"
    )
    eos, reasons = eos_token_id(tokenizer), table["finish_reason"].to_pylist()
    ended = [[*answer, eos] if why == "stop" else answer for answer, why in zip(answers, reasons, strict=True)]
    long = [row for row, answer in zip(ids, ended, strict=True) if len(answer) > limit]
    if long_responses == "error":
        longest = max(map(len, ended), default=0)
        _check_none(
            long,
            f"have a response, end token included, that is longer than {limit}; the longest has {longest}: raise the "
            "limit, or set long_responses: cut",
            argument="max_response_tokens",
        )
    lost = "end" if formatter.keep == "start" else "start"
    _log_cut("queries", sum(prompt.truncated for prompt in prompts), "max_query_tokens", lost)
    _log_cut("responses", len(long), "max_response_tokens", "end")
    response_ids = [answer[:limit] for answer in ended]
    return TrainingRows(ids, [prompt.token_ids for prompt in prompts], response_ids, matrix(table["embedding"]))


def _log_cut(texts: str, count: int, limit: str, lost: str) -> None:
    if count:
        log.warning("%d %s are longer than %s and lose their %s", count, texts, limit, lost)
