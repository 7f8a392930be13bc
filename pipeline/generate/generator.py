"""Let the backbone answer every query, row by row into a resumable store.

Only finished answers enter the store. A failed row stays in memory, goes into the artifact with its reason, and is
tried again by the next run; so an id never has two rows.
"""

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Generator as GeneratorOf
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import PART_BYTES
from pipeline.core.errors import EngineError, nested_in
from pipeline.core.files import disk_errors, write_json, write_parquet
from pipeline.core.gates import FIRST_ROWS, warn_of_gates
from pipeline.core.row_store import ShardStore
from pipeline.core.run import gpu_memory_mib, progress
from pipeline.core.sorted_ids import pieces
from pipeline.core.tracking import Log, ProgressLog
from pipeline.generate.engines.base import Completion, Engine, Prompt, Query, Sampling, TextEngine
from pipeline.generate.engines.registry import build_engine
from pipeline.generate.params import GenerateParams
from pipeline.generate.queries import QueryMaker
from pipeline.generate.response_counts import CAUSES, MANY_CUT, STORE, ResponseCounts, failures
from pipeline.generate.response_text import opens_thinking, strip_thinking
from pipeline.generate.samples import gathered, is_first, sampled_ids, sampled_rows
from pipeline.parallel.prefetch import ahead

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 8
BYTES_PER_ROW = 256
# In the store's folder: the rows that are left, for an engine that reads them itself.
TODO = "todo"
# Failures in one pass that end the run at once if they also exceed the limit: a long run would fail hours later.
HOPELESS = 1000


@dataclass
class GenerationFacts:
    """Counts and times of a run, for its record."""

    rows: int = 0
    reused_rows: int = 0
    computed_rows: int = 0
    dropped_rows: int = 0
    retried_rows: int = 0
    startup_seconds: float = 0.0
    generate_seconds: float = 0.0
    prompt_tokens: int = 0
    response_tokens: int = 0
    gpu_memory_mib: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        seconds = self.generate_seconds or float("inf")
        return {
            **vars(self),
            "startup_seconds": round(self.startup_seconds, 2),
            "generate_seconds": round(self.generate_seconds, 2),
            "response_tokens_per_second": round(self.response_tokens / seconds, 1),
            "total_tokens_per_second": round((self.prompt_tokens + self.response_tokens) / seconds, 1),
        }


# Answers as they arrive, each with its query.
_Answers = GeneratorOf[tuple[Query, Completion], None, None]


@dataclass
class Generator:
    """One run over all queries.

    Attributes:
        store: the finished rows (schema `response_counts.STORE`).
        load_engine: starts the engine; not called if every row is finished.
        seed: each row's seed follows from this and its id.
        max_failed_fraction: share of failed rows (0 to 1) above which the run fails.
        drop_too_long: record a query that the formatter must cut as dropped, without an answer.
        strip_thinking: leave thinking out of the answers.
        samples: answers to each query, see `samples.py`; counts and limits are of these.
        look: gets the first `FIRST_ROWS` answered rows of the run, once (schema `response_counts.STORE`).
        track: gets the progress.
    """

    store: ShardStore
    load_engine: Callable[[], Engine]
    formatter: PromptFormatter
    sampling: Sampling
    seed: int
    max_failed_fraction: float
    drop_too_long: bool = False
    strip_thinking: bool = True
    samples: int = 1
    look: Callable[[pa.Table], None] | None = None
    track: ProgressLog = field(default_factory=lambda: ProgressLog(None))
    facts: GenerationFacts = field(default_factory=GenerationFacts)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _retries: dict[str, Query] = field(default_factory=dict)
    _first: list[dict[str, Any]] = field(default_factory=list)

    def run(self, ids: Callable[[], Iterable[pa.Array]], batches: Iterable[pa.Table]) -> None:
        """Answer the queries that the store lacks; failed ones are tried twice.

        Args:
            ids: reads those of all queries, in order and in pieces of any size.
            batches: the queries, in columns `id` and `text`; the longest prompts of a batch come first.

        Raises:
            EngineError: the engine broke or too many rows failed; finished rows are kept.
        """
        for piece in self._sampled(ids()):
            self.facts.rows += len(piece)
            self.facts.reused_rows += len(self.store.committed(piece.to_pylist()))
        if self.facts.reused_rows:
            log.info("generate: %d of %d rows are already finished", self.facts.reused_rows, self.facts.rows)
        missing = self._missing(sampled_rows(batch, self.samples) for batch in batches)
        if first := next(filter(self._wants_engine, missing), None):
            self._answer(chain([first], missing))
        self.store.flush()
        self._check_answered(self._sampled(ids()))
        self._check_failed()

    def tables(self, ids: Iterable[pa.Array], rows_per_table: int) -> Iterator[pa.Table]:
        """Rows of the sorted `ids` in schema `response_counts.STORE`, in tables of `rows_per_table` rows.

        With several samples they have the column `SAMPLES` too.
        """
        return gathered(self._rows(ids, rows_per_table * self.samples), self.samples)

    def _sampled(self, ids: Iterable[pa.Array]) -> Iterator[pa.Array]:
        return (sampled_ids(piece, self.samples) for piece in ids)

    def _rows(self, ids: Iterable[pa.Array], rows_per_table: int) -> Iterator[pa.Table]:
        for part in pieces(self._sampled(ids), rows_per_table):
            failed = pa.Table.from_pylist([self.failed[i] for i in part.to_pylist() if i in self.failed], schema=STORE)
            done = part.filter(pc.invert(pc.is_in(part, failed["id"].combine_chunks())))
            yield pa.concat_tables([self.store.take(done), failed]).sort_by("id")

    def _missing(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The unfinished rows of each batch."""
        for batch in batches:
            ids = batch["id"].to_pylist()
            finished = self.store.committed(ids)
            if len(finished) < len(ids):
                yield batch.select(["id", "text"]).filter(pa.array([row_id not in finished for row_id in ids]))

    def _answer(self, tables: Iterator[pa.Table]) -> None:
        started = monotonic()
        with closing(self.load_engine()) as engine:
            self.facts.startup_seconds = monotonic() - started
            log.info("generate: the engine started in %.1f s", self.facts.startup_seconds)
            started = monotonic()
            try:
                self._pass(self._first_try(engine, tables), initial=self.facts.reused_rows)
                if self.failed:
                    log.warning("generate: %d rows failed (%s), second try", len(self.failed), self._reasons())
                    self.facts.retried_rows = len(self.failed)
                    retries, self.failed, self._retries = sorted(self._retries.items()), {}, {}
                    again = self._asked(engine, (query for _, query in retries))
                    self._pass(again, initial=self.facts.rows - len(retries))
            finally:
                self.facts.generate_seconds = monotonic() - started
                self.facts.gpu_memory_mib = gpu_memory_mib()

    @property
    def _make(self) -> QueryMaker:
        return QueryMaker(self.formatter, self.seed, self.drop_too_long)

    def _wants_engine(self, table: pa.Table) -> bool:
        """Whether an engine must answer a row of the table; if not, all its rows are recorded as dropped."""
        if not self.drop_too_long:
            return True
        queries = self._make(table)
        wanted = not all(query.refused for query in queries)
        for query in () if wanted else queries:
            self._drop(query)
        return wanted

    def _first_try(self, engine: Engine, tables: Iterator[pa.Table]) -> _Answers:
        if isinstance(engine, TextEngine):
            folder = _written(tables, self.store.path / TODO)
            for query, completion in engine.answer(folder, self._make, self.sampling):
                if query.refused:
                    self._drop(query)
                else:
                    yield query, completion
            shutil.rmtree(folder)
        else:
            # A thread, and so not before the engine has started: it may fork.
            with closing(ahead(self._windows(tables))) as windows:
                yield from self._asked(engine, chain.from_iterable(windows))

    def _windows(self, tables: Iterable[pa.Table]) -> Iterator[list[Query]]:
        """The queries of each table; they are made in a thread while the engine has the table before."""
        for table in tables:
            queries = self._make(table)
            for query in queries:
                if query.refused:
                    self._drop(query)
            # The longest first: too little memory shows at once, and no long row is left alone at the end.
            wanted = [query for query in queries if not query.refused]
            yield sorted(wanted, key=lambda query: -len(query.prompt.token_ids))

    def _asked(self, engine: Engine, queries: Iterable[Query]) -> _Answers:
        in_flight: dict[str, Query] = {}

        def prompts() -> Iterator[Prompt]:
            for query in queries:
                in_flight[query.prompt.id] = query
                yield query.prompt

        yield from ((in_flight.pop(found.id), found) for found in engine.generate(prompts(), self.sampling))

    def _pass(self, answers: _Answers, initial: int) -> None:
        started, tokens = monotonic(), 0
        with closing(answers):
            bar = progress(answers, total=self.facts.rows, desc="generate", initial=initial)
            for done, (query, completion) in enumerate(bar, start=initial + 1):
                self._record(completion, query)
                tokens += completion.response_tokens
                bar.total = self.facts.rows - self.facts.dropped_rows
                failed = f", {len(self.failed)} failed" if self.failed else ""
                rate = tokens / max(monotonic() - started, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s{failed}", refresh=False)
                self.track(done, bar.total, rate)

    def _drop(self, query: Query) -> None:
        self.store.add(_row(query, "", "error", query.refused))
        self.facts.dropped_rows += 1

    def _record(self, completion: Completion, query: Query) -> None:
        if completion.finish_reason == "error":
            self.failed[completion.id] = _row(query, "", "error", completion.error or "no reason given")
            self._retries[completion.id] = query
            if len(self.failed) >= HOPELESS and self._too_many_failed():
                self._check_failed()
            return
        text = completion.text
        if self.strip_thinking:
            text = strip_thinking(text, opened=self._opens_thinking, cut=completion.finish_reason == "length")
        row = _row(query, text, completion.finish_reason)
        row |= {"response_tokens": completion.response_tokens, "thinking": text != completion.text}
        self.store.add(row)
        self._look_at(row)
        self.facts.computed_rows += 1
        self.facts.prompt_tokens += query.columns["prompt_tokens"]
        self.facts.response_tokens += completion.response_tokens

    def _look_at(self, row: dict[str, Any]) -> None:
        if self.look is None or self.facts.computed_rows >= FIRST_ROWS or not is_first(row["id"]):
            return
        self._first.append(row)
        if len(self._first) == FIRST_ROWS:
            self.look(pa.Table.from_pylist(self._first, schema=STORE))
            self._first.clear()

    @cached_property
    def _opens_thinking(self) -> bool:
        return opens_thinking(self.formatter.frame)

    def _check_answered(self, ids: Iterable[pa.Array]) -> None:
        count, example = 0, ""
        for piece in ids:
            wanted = piece.to_pylist()
            answered = self.store.committed(wanted)
            missing = [row_id for row_id in wanted if row_id not in answered and row_id not in self.failed]
            count, example = count + len(missing), example or next(iter(missing), "")
        if count:
            raise EngineError(f"the engine gave no answer for {count} prompts, e.g. {example}")

    def _too_many_failed(self) -> bool:
        return len(self.failed) > self.max_failed_fraction * self.facts.rows

    def _check_failed(self) -> None:
        listing = self.store.path / "failed.json"
        if not self.failed:
            listing.unlink(missing_ok=True)
            return
        write_json(listing, {row_id: row["error"] for row_id, row in sorted(self.failed.items())})
        limit, rows = self.max_failed_fraction, self.facts.rows
        what = f"{len(self.failed)} of {rows} rows failed ({self._reasons()}), e.g. id {min(self.failed)}"
        if self._too_many_failed():
            message = f"{what}; the limit is {limit}. Finished rows are kept; {listing} lists the failed ones"
            raise EngineError(message, argument="max_failed_fraction")
        log.warning("generate: %s; within max_failed_fraction %s", what, limit)

    def _reasons(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in failures(self.failed.values()).most_common(5))


def _written(tables: Iterable[pa.Table], folder: Path) -> Path:
    """The folder, with these tables as its only files, each with its longest texts first; `number` counts the rows."""
    shutil.rmtree(folder, ignore_errors=True)
    rows = 0
    for part, table in enumerate(tables):
        longest_first = pc.array_sort_indices(pc.utf8_length(table["text"]).combine_chunks(), order="descending")
        numbers = pa.array(range(rows, rows + table.num_rows), pa.int64())
        rows += table.num_rows
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            write_parquet(table.take(longest_first).append_column("number", numbers), folder / f"{part:08d}.parquet")
    return folder


def _row(query: Query, response: str, finish_reason: str, error: str | None = None) -> dict[str, Any]:
    return {
        **query.columns,
        "id": query.prompt.id,
        "response": response,
        "finish_reason": finish_reason,
        "response_tokens": 0,
        "error": error,
        "thinking": False,
    }


def rows_per_part(max_new_tokens: int) -> int:
    """Most rows of a part of the responses below `PART_BYTES`."""
    return max(1, PART_BYTES // (BYTES_PER_ROW + BYTES_PER_TOKEN * max_new_tokens))


def answer_content(backbone: BackboneParams, params: GenerateParams) -> dict[str, Any]:
    """What decides an answer besides the backbone's weights and the prompt; serialises to JSON."""
    return {"generate": params.content(), "chat_template_kwargs": backbone.chat_template_kwargs}


def make_generator(
    backbone: BackboneParams, params: GenerateParams, store: ShardStore, log_progress: Log | None = None
) -> Generator:
    """A Generator by the sections `backbone` and `generate`, its engine not loaded yet.

    Raises BackboneError if the tokenizer cannot be used.
    """

    def load_engine() -> Engine:
        return build_engine(
            params.engine,
            backbone,
            dtype=params.dtype,
            max_prompt_tokens=params.max_prompt_tokens,
            max_new_tokens=params.max_new_tokens,
            options=params.options,
            tensor_parallel=params.tensor_parallel,
            data_parallel=params.data_parallel,
            batch_invariant=params.batch_invariant,
        )

    with nested_in(names={"max_tokens": "max_prompt_tokens"}):
        formatter = PromptFormatter(
            load_tokenizer(backbone),
            "chat",
            params.max_prompt_tokens,
            backbone.chat_template_kwargs,
            keep="end" if params.too_long == "keep_end" else "start",
            system=params.system,
        )
    return Generator(
        store=store,
        load_engine=load_engine,
        formatter=formatter,
        sampling=params.sampling,
        seed=params.seed,
        max_failed_fraction=params.max_failed_fraction,
        drop_too_long=params.too_long == "drop",
        strip_thinking=params.strip_thinking,
        samples=params.samples_per_query,
        look=partial(_warn, params),
        track=ProgressLog(log_progress),
    )


def measured(params: GenerateParams, counts: ResponseCounts) -> dict[str, float]:
    """What `generate.gates` limits; thinking that was to stay is no defect."""
    return {name: share for name, share in counts.shares().items() if params.strip_thinking or name != "thinking"}


def _warn(params: GenerateParams, rows: pa.Table) -> None:
    counts = ResponseCounts()
    deque(counts.through([rows]), maxlen=0)
    shares = measured(params, counts)
    warn_of_gates("generate", params.gates, shares, CAUSES)
    if MANY_CUT < shares["cut"] <= params.gates.cut:
        log.warning("generate: %.0f %% of the first answers end at max_new_tokens", 100 * shares["cut"])
