"""Training rows: queries, responses and targets joined by id, checked and tokenised once, a few rows at a time."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.loading import Pool
from pipeline.backbone.prompting import PromptFormatter, eos_token_id
from pipeline.core.artifacts import Artifact
from pipeline.core.errors import TrainingError
from pipeline.core.paths import HELDOUT_TABLE
from pipeline.core.schemas import QUERY_EMBEDDING
from pipeline.encoder.passes.plain import Pooled, pooled_of
from pipeline.generate.response_text import ends_in_loop
from pipeline.train.losses import Batch
from pipeline.train.row_files import SpanRows, TextRows, TokenRows, VectorRows

log = logging.getLogger(__name__)

READ_ROWS = 4096  # that are joined and tokenised together
NAMED_IDS = 5


@dataclass(frozen=True)
class TrainingRows:
    """N rows, aligned: row ids, prompt ids, response ids (EOS included) and targets float32 `[N, e]`.

    Columns may lie in memory or in files (`row_files`): rows are taken by number, and none is changed. `pooled` are the
    tokens that embeddings are made of; None: the compression tokens. `query_targets` float32 `[N, e]` are the teacher's
    embeddings of the queries; None: it gave none.
    """

    ids: Sequence[str]
    query_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    targets: Any
    pooled: Pooled | None = None
    query_targets: Any = None

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def width(self) -> int:
        """e, dimensions of a target."""
        return int(self.targets.shape[1])

    def lengths(self, extra: int) -> np.ndarray:
        """Tokens `[N]` that each row sends through the backbone: query, response and `extra` others."""
        return self._query_lengths + self._response_lengths + extra

    def sizes(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Query tokens and response tokens of these rows."""
        return [(int(self._query_lengths[row]), int(self._response_lengths[row])) for row in rows]

    def query_lengths(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Query tokens of these rows, `[B]`."""
        return self._query_lengths[rows]

    @cached_property
    def _query_lengths(self) -> np.ndarray:
        return _lengths(self.query_ids)

    @cached_property
    def _response_lengths(self) -> np.ndarray:
        return _lengths(self.response_ids)

    def head(self, count: int) -> "TrainingRows":
        """The first `count` rows, in memory."""
        queries, pooled = self.queries(range(min(count, len(self))))
        return TrainingRows(self.ids[:count], queries, self.response_ids[:count], self.targets[:count], pooled)

    def queries(self, rows: Sequence[int]) -> tuple[list[Sequence[int]], Pooled | None]:
        """Prompt ids of these rows, and what is pooled of them."""
        return [self.query_ids[row] for row in rows], self.pooled.take(rows) if self.pooled else None

    def prompts(self, rows: Sequence[int]) -> dict[str, Any]:
        """The same, as it serialises to JSON."""
        ids, pooled = self.queries(rows)
        if pooled is None:
            return {"ids": ids}
        spans = [(span.start, span.stop) for span in pooled.spans]
        return {"ids": ids, "spans": spans, "with_tokens": pooled.with_tokens}

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of one forward pass."""
        queries, pooled = self.queries(rows)
        responses = [self.response_ids[row] for row in rows]
        return Batch(queries, responses, torch.from_numpy(self.targets[list(rows)]), pooled)


def _lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each row, int64 [N]."""
    known = rows.lengths if isinstance(rows, TokenRows) else np.fromiter(map(len, rows), np.int64, len(rows))
    return known.astype(np.int64)


class _Along:
    """Rows of an artifact, read once in the order of their ids, beside another table."""

    def __init__(self, artifact: Artifact, columns: list[str]) -> None:
        self._batches = artifact.batches(columns, READ_ROWS)
        self._held: pa.Table | None = None
        self._none = pq.read_schema(artifact.tables()[0]).empty_table().select(columns)

    def of(self, ids: pa.ChunkedArray) -> pa.Table:
        """Those with these ids, which are sorted and larger than all that were asked for before."""
        wanted, found = ids.combine_chunks(), [self._none]
        while (batch := self._held if self._held is not None else next(self._batches, None)) is not None:
            found.append(batch.filter(pc.is_in(batch["id"], wanted)))
            self._held = batch if batch["id"][-1].as_py() > wanted[-1].as_py() else None
            if self._held is not None:
                break
        return pa.concat_tables(found)


def join(queries: pa.Table, responses: pa.Table, targets: pa.Table) -> pa.Table:
    """Rows of `queries` that have a target, with the columns response, finish_reason and those of `targets`.

    A query whose response failed or is blank has no target by design and is left out. Raises TrainingError if no query
    has a target, or one with a usable response has none.
    """
    joined, without = _join(queries, responses, targets)
    _check_some(joined.num_rows, queries.num_rows)
    _Found().add(without).must_be_none("have a usable response but no target: run embed again")
    return joined


def read_joined(queries: Artifact, responses: Artifact, targets: Artifact, name: str) -> Iterator[pa.Table]:
    """One table of the queries, joined as by `join`, some rows at a time; what `join` raises is raised at the end."""
    answers = _Along(responses, ["id", "response", "finish_reason"])
    vectors = _Along(targets, pq.read_schema(targets.tables()[0]).names)
    without, rows, read = _Found(), 0, 0
    for batch in queries.batches(["id", "text"], READ_ROWS, name):
        joined, missing = _join(batch, answers.of(batch["id"]), vectors.of(batch["id"]))
        without.add(missing)
        rows, read = rows + joined.num_rows, read + batch.num_rows
        if joined.num_rows:
            yield joined
    _check_some(rows, read, name)
    without.must_be_none("have a usable response but no target: run embed again")


def _join(queries: pa.Table, responses: pa.Table, targets: pa.Table) -> tuple[pa.Table, Sequence[str]]:
    """The joined rows, and the ids of queries with a usable response and no target."""
    has_target = pc.is_in(queries["id"], targets["id"].combine_chunks())
    joined = queries.filter(has_target)
    usable = pc.is_in(queries["id"], usable_ids(responses))
    without = queries.filter(pc.and_not(usable, has_target))
    of_targets = [name for name in targets.column_names if name != "id"]
    for table, columns in ((responses, ["response", "finish_reason"]), (targets, of_targets)):
        rows = pc.index_in(joined["id"], table["id"].combine_chunks())
        for column in columns:
            joined = joined.append_column(column, table[column].take(rows))
    return joined, without["id"].to_pylist()


def _check_some(joined: int, queries: int, name: str = "") -> None:
    if not joined:
        # With few held-out queries the answers to all of them may fail or be blank, however often they are made.
        more = "raise collect.heldout_fraction, or " if name == HELDOUT_TABLE else ""
        of = f" of {name}" if name else ""
        raise TrainingError(f"none of {queries} queries{of} has a target: {more}run generate and embed again")


@dataclass
class _Found:
    """How many queries have a problem, and the first of them."""

    count: int = 0
    first: tuple[str, ...] = ()

    def add(self, ids: Sequence[str]) -> Self:
        self.count += len(ids)
        self.first = (*self.first, *ids)[:NAMED_IDS]
        return self

    def must_be_none(self, problem: str, argument: str | None = None) -> None:
        """Raises TrainingError if there are some."""
        if self.count:
            shown = ", ".join(self.first) + (", ..." if self.count > NAMED_IDS else "")
            raise TrainingError(f"{self.count} queries {problem} (ids {shown})", argument=argument)


def usable_ids(responses: pa.Table) -> pa.Array:
    """Ids of the responses that embed takes: not failed, not blank."""
    blank = pc.equal(pc.utf8_trim_whitespace(responses["response"]), "")
    failed = pc.equal(responses["finish_reason"], "error")
    return responses["id"].filter(pc.invert(pc.or_(blank, failed))).combine_chunks()


def drop_loops(tables: Iterable[pa.Table], name: str) -> Iterator[pa.Table]:
    """Joined tables of `name` without the rows whose response ends in a loop.

    Raises TrainingError at the end if no row was left.
    """
    read = left = 0
    for table in tables:
        kept = [not ends_in_loop(text) for text in table["response"].to_pylist()]
        read, left = read + len(kept), left + sum(kept)
        if any(kept):
            yield table.filter(pa.array(kept, pa.bool_()))
    log.info("%s: %d of %d responses end in a repetition loop, left out", name, read - left, read)
    if not left:
        raise TrainingError(f"all {read} responses of {name} end in a repetition loop", argument="drop_loops")


def tokenize(
    tables: Iterable[pa.Table],
    formatter: PromptFormatter,
    tokenizer: PreTrainedTokenizerBase,
    max_response_tokens: int,
    long_responses: Literal["error", "cut"] = "error",
    pool: Pool = "tokens",
    *,
    folder: Path,
) -> TrainingRows:
    """Tokenise joined tables, at least one row, into files in `folder`, which go with the process.

    A `pool` other than "tokens" needs the template `echo`.

    A response ends with EOS only where the model itself stopped: one that was cut has no end to predict.

    Raises TrainingError if a response has no token, or is longer than `max_response_tokens` and may not be cut.
    """
    limit, eos = max_response_tokens, eos_token_id(tokenizer)
    ids, prompts, answers = list[pa.ChunkedArray](), TokenRows(folder), TokenRows(folder)
    targets, of_queries, spans, control = VectorRows(folder), VectorRows(folder), SpanRows(), ControlTokens(tokenizer)
    empty, long, longest, cut = _Found(), _Found(), 0, 0
    for table in tables:
        names, reasons = table["id"].to_pylist(), table["finish_reason"].to_pylist()
        formatted = formatter.batch(table["text"].to_pylist())
        encoded = control.encode(table["response"].to_pylist(), add_special_tokens=False)["input_ids"]
        empty.add([row for row, answer in zip(names, encoded, strict=True) if not answer])
        ended = [[*answer, eos] if why == "stop" else answer for answer, why in zip(encoded, reasons, strict=True)]
        long.add([row for row, answer in zip(names, ended, strict=True) if len(answer) > limit])
        longest, cut = max(longest, *map(len, ended)), cut + sum(prompt.truncated for prompt in formatted)
        ids += table["id"].chunks
        prompts.append([prompt.token_ids for prompt in formatted])
        if (pooled := pooled_of(formatted, pool)) is not None:
            spans.append(pooled.spans)
        answers.append([answer[:limit] for answer in ended])
        targets.append(_stored(table["embedding"]))
        if QUERY_EMBEDDING in table.column_names:
            of_queries.append(_stored(table[QUERY_EMBEDDING]))
    empty.must_be_none("have a response without a token")
    if long_responses == "error":
        long.must_be_none(
            f"have a response, end token included, that is longer than {limit}; the longest has {longest}: raise the "
            "limit, or set long_responses: cut",
            argument="max_response_tokens",
        )
    lost = "end" if formatter.keep == "start" else "start"
    _log_cut("queries", cut, "max_query_tokens", lost)
    _log_cut("responses", long.count, "max_response_tokens", "end")
    what = None if pool == "tokens" else Pooled(spans, with_tokens=pool == "both")
    found = of_queries if len(of_queries) else None
    return TrainingRows(TextRows(pa.chunked_array(ids)), prompts, answers, targets, what, found)


def _stored(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors in its own type, `[B, e]`."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)


def _log_cut(texts: str, count: int, limit: str, lost: str) -> None:
    if count:
        log.warning("%d %s are longer than %s and lose their %s", count, texts, limit, lost)
