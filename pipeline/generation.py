"""Let the backbone answer every query, row by row into a resumable store.

Only finished answers enter the store. A row that failed is kept apart in memory, recorded with its reason in the
artifact, and tried again by the next run; so an id never has two rows.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.artifacts import PART_BYTES
from pipeline.backbone import DType, PromptFormatter
from pipeline.contracts import FINISH_REASONS, RESPONSES
from pipeline.engines import EngineFacts, EngineName
from pipeline.engines.base import Completion, Engine, Prompt, Sampling
from pipeline.errors import EngineError
from pipeline.params import Params
from pipeline.runtime import progress
from pipeline.shards import ShardStore

log = logging.getLogger(__name__)

# `truncated` is counted in the manifest, so a resumed run must know it of the rows that it finds done.
STORE = RESPONSES.append(pa.field("truncated", pa.bool_(), nullable=False))
BYTES_PER_TOKEN = 8
BYTES_PER_ROW = 256


class GenerateParams(Params):
    """Section `generate`."""

    engine: EngineName
    dtype: DType = Field(description="of the weights that generate")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1, description="template included; a longer query loses its end")
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, description="of sampling; each row has its own, derived from this and its id")
    max_failed_fraction: float = Field(default=0.0, ge=0, le=1, description="more failed rows than this fail the stage")
    options: dict[str, Any] = Field(default_factory=dict, description="the engine's own options")

    @property
    def sampling(self) -> Sampling:
        """The decoding params that engines take."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def content(self, facts: EngineFacts) -> dict[str, Any]:
        """What decides the bytes of a row: all params but those of speed and tolerance."""
        options = {key: value for key, value in self.options.items() if key not in facts.speed_options}
        params = self.model_dump(exclude={"max_failed_fraction"}) | {"options": options}
        return params | {"engine_version": facts.version, "stub": facts.stub}


@dataclass
class GenerationFacts:
    """What a run did; volatile, so it goes to results/."""

    rows: int = 0
    reused_rows: int = 0
    computed_rows: int = 0
    retried_rows: int = 0
    startup_seconds: float = 0.0
    generate_seconds: float = 0.0
    prompt_tokens: int = 0
    response_tokens: int = 0

    def summary(self) -> dict[str, Any]:
        """All facts, with the tokens per second that follow."""
        seconds = self.generate_seconds or float("inf")
        return {
            **vars(self),
            "startup_seconds": round(self.startup_seconds, 2),
            "generate_seconds": round(self.generate_seconds, 2),
            "response_tokens_per_second": round(self.response_tokens / seconds, 1),
            "total_tokens_per_second": round((self.prompt_tokens + self.response_tokens) / seconds, 1),
        }


@dataclass
class Generator:
    """The work of one run.

    Attributes:
        store: holds the finished rows (schema `STORE`).
        load_engine: starts the engine; not called when nothing is left to do.
        formatter: turns a text into prompt tokens.
        sampling: decoding params.
        seed: of all rows.
        max_failed_fraction: share of failed rows (0 to 1) above which the run fails.
    """

    store: ShardStore
    load_engine: Callable[[], Engine]
    formatter: PromptFormatter
    sampling: Sampling
    seed: int
    max_failed_fraction: float
    facts: GenerationFacts = field(default_factory=GenerationFacts)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, queries: Mapping[str, str]) -> None:
        """Answer the queries (id -> text) that the store lacks; those that fail are tried twice.

        Raises:
            EngineError: the engine broke, or too many rows failed; finished rows are kept.
        """
        todo = sorted(row_id for row_id in queries if row_id not in self.store)
        self.facts.rows, self.facts.reused_rows = len(queries), len(queries) - len(todo)
        if self.facts.reused_rows:
            log.info("generate: %d of %d rows are done already", self.facts.reused_rows, len(queries))
        if todo:
            self._answer(todo, queries)
        self._check_failed(len(queries))

    def tables(self, ids: Iterable[str], rows_per_table: int) -> Iterator[pa.Table]:
        """Rows of `ids` in schema `STORE`, sorted by id, in tables of `rows_per_table` rows."""
        ordered = sorted(ids)
        for start in range(0, len(ordered), rows_per_table):
            part = ordered[start : start + rows_per_table]
            done = [row_id for row_id in part if row_id not in self.failed]
            failed = pa.Table.from_pylist([self.failed[i] for i in part if i in self.failed], schema=STORE)
            yield pa.concat_tables([*self.store.sorted_tables(done, rows_per_table), failed]).sort_by("id")

    def _answer(self, todo: Sequence[str], queries: Mapping[str, str]) -> None:
        started = monotonic()
        with closing(self.load_engine()) as engine:
            self.facts.startup_seconds = monotonic() - started
            started = monotonic()
            try:
                self._pass(engine, todo, queries)
                if again := sorted(self.failed):
                    log.warning("generate: %d rows failed (%s): trying them once more", len(again), self._reasons())
                    self.facts.retried_rows = len(again)
                    self.failed = {}
                    self._pass(engine, again, queries)
            finally:
                self.facts.generate_seconds = monotonic() - started
            self.store.flush()

    def _pass(self, engine: Engine, ids: Sequence[str], queries: Mapping[str, str]) -> None:
        in_flight: dict[str, tuple[int, bool]] = {}
        started, tokens = monotonic(), 0
        completions = engine.generate(self._prompts(ids, queries, in_flight), self.sampling)
        bar = progress(completions, total=len(queries), desc="generate", initial=len(queries) - len(ids))
        for completion in bar:
            self._record(completion, *in_flight.pop(completion.id))
            tokens += completion.response_tokens
            bar.set_postfix_str(f"{tokens / (monotonic() - started):.0f} tokens/s", refresh=False)
        if in_flight:
            raise EngineError(f"the engine gave no answer for {len(in_flight)} prompts, e.g. {min(in_flight)}")

    def _prompts(
        self, ids: Sequence[str], queries: Mapping[str, str], in_flight: dict[str, tuple[int, bool]]
    ) -> Iterator[Prompt]:
        for row_id in ids:
            formatted = self.formatter(queries[row_id])
            in_flight[row_id] = len(formatted.token_ids), formatted.truncated
            yield Prompt(row_id, formatted.token_ids, row_seed(self.seed, row_id))

    def _record(self, completion: Completion, prompt_tokens: int, truncated: bool) -> None:
        row = {
            "id": completion.id,
            "response": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": prompt_tokens,
            "response_tokens": completion.response_tokens,
            "error": None,
            "truncated": truncated,
        }
        if completion.finish_reason == "error":
            self.failed[completion.id] = row | {"error": completion.error or "no reason given"}
            return
        self.store.add(row)
        self.facts.computed_rows += 1
        self.facts.prompt_tokens += prompt_tokens
        self.facts.response_tokens += completion.response_tokens

    def _check_failed(self, rows: int) -> None:
        if not self.failed:
            return
        limit = self.max_failed_fraction
        what = f"{len(self.failed)} of {rows} rows failed twice ({self._reasons()}), e.g. id {min(self.failed)}"
        if len(self.failed) > limit * rows:
            raise EngineError(f"generate: {what}; generate.max_failed_fraction is {limit}. Finished rows are kept")
        log.warning("generate: %s; within generate.max_failed_fraction %s, recorded as errors", what, limit)

    def _reasons(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in failures(self.failed.values()).most_common(5))


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row, below 2**63: the same in every batch and every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8]) >> 1


def failures(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many rows failed for each kind of reason (what comes before its first colon)."""
    return Counter(str(row["error"]).split(":")[0] for row in rows)


def rows_per_part(max_new_tokens: int) -> int:
    """Rows that keep a part of the responses below `PART_BYTES`."""
    return max(1, PART_BYTES // (BYTES_PER_ROW + BYTES_PER_TOKEN * max_new_tokens))


class ResponseCounts:
    """Counts what passes by: rows by finish reason, empty answers, truncated prompts, failures by reason."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._empty = self._truncated = 0

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables (schema `STORE`) as `contracts.RESPONSES`, counted."""
        for table in tables:
            self._count(table)
            yield table.drop_columns("truncated")

    def summary(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "finish_reason": {reason: self._reasons[reason] for reason in FINISH_REASONS},
            "empty_responses": self._empty,
            "truncated_prompts": self._truncated,
            "errors": dict(self._errors),
        }

    def _count(self, table: pa.Table) -> None:
        self._reasons.update(table.column("finish_reason").to_pylist())
        self._truncated += pc.sum(table.column("truncated")).as_py() or 0
        failed = table.filter(pc.equal(table.column("finish_reason"), "error"))
        self._errors.update(failures(failed.select(["error"]).to_pylist()))
        blank = pc.equal(pc.utf8_trim_whitespace(table.column("response")), "")
        self._empty += (pc.sum(blank).as_py() or 0) - failed.num_rows
