"""Let the backbone answer every query, row by row into a resumable store.

Only finished answers enter the store. A failed row stays in memory, goes into the artifact with its reason, and is
tried again by the next run; so an id never has two rows.
"""

import hashlib
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Generator as GeneratorOf
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from time import monotonic
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import PART_BYTES, write_json
from pipeline.core.errors import EngineError, nested_in
from pipeline.core.gates import FIRST_ROWS, warn_of_gates
from pipeline.core.row_store import ShardStore
from pipeline.core.run import gpu_memory_mib, progress
from pipeline.core.sorted_ids import pieces
from pipeline.core.tracking import Log, ProgressLog
from pipeline.generate.engines.base import Completion, Engine, Prompt, Sampling
from pipeline.generate.engines.registry import build_engine
from pipeline.generate.params import GenerateParams
from pipeline.generate.response_counts import CAUSES, DROPPED, MANY_CUT, STORE, ResponseCounts, failures
from pipeline.generate.response_text import opens_thinking, strip_thinking
from pipeline.parallel.prefetch import ahead

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 8
BYTES_PER_ROW = 256
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


class _Query(NamedTuple):
    prompt: Prompt
    truncated: bool
    control_tokens: bool


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
    look: Callable[[pa.Table], None] | None = None
    track: ProgressLog = field(default_factory=lambda: ProgressLog(None))
    facts: GenerationFacts = field(default_factory=GenerationFacts)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _retries: dict[str, _Query] = field(default_factory=dict)
    _first: list[dict[str, Any]] = field(default_factory=list)

    def run(self, ids: Callable[[], Iterable[pa.Array]], batches: Iterable[pa.Table]) -> None:
        """Answer the queries that the store lacks; failed ones are tried twice.

        Args:
            ids: reads those of all queries, in order and in pieces of any size.
            batches: the queries, in columns `id` and `text`; the longest prompts of a batch come first.

        Raises:
            EngineError: the engine broke or too many rows failed; finished rows are kept.
        """
        for piece in ids():
            self.facts.rows += len(piece)
            self.facts.reused_rows += len(self.store.committed(piece.to_pylist()))
        if self.facts.reused_rows:
            log.info("generate: %d of %d rows are already finished", self.facts.reused_rows, self.facts.rows)
        windows = filter(None, self._missing(batches))
        if first := next(windows, None):
            self._answer(first, windows)
        self.store.flush()
        self._check_answered(ids())
        self._check_failed()

    def tables(self, ids: Iterable[pa.Array], rows_per_table: int) -> Iterator[pa.Table]:
        """Rows of the sorted `ids` in schema `response_counts.STORE`, in tables of `rows_per_table` rows."""
        for part in pieces(ids, rows_per_table):
            failed = pa.Table.from_pylist([self.failed[i] for i in part.to_pylist() if i in self.failed], schema=STORE)
            done = part.filter(pc.invert(pc.is_in(part, failed["id"].combine_chunks())))
            yield pa.concat_tables([self.store.take(done), failed]).sort_by("id")

    def _missing(self, batches: Iterable[pa.Table]) -> Iterator[list[_Query]]:
        """The unfinished queries of each batch."""
        for batch in batches:
            rows = zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
            finished = self.store.committed(batch["id"].to_pylist())
            missing = {row_id: text for row_id, text in rows if row_id not in finished}
            queries = []
            for row_id, formatted in zip(missing, self.formatter.batch(list(missing.values())), strict=True):
                prompt = Prompt(row_id, formatted.token_ids, row_seed(self.seed, row_id), formatted.text)
                query = _Query(prompt, formatted.truncated, formatted.control_tokens)
                if query.truncated and self.drop_too_long:
                    self.store.add(_row(query, "", "error", f"{DROPPED}: longer than max_prompt_tokens"))
                    self.facts.dropped_rows += 1
                else:
                    queries.append(query)
            # The longest first: too little memory shows at once, and no long row is left alone at the end.
            yield sorted(queries, key=lambda query: -len(query.prompt.token_ids))

    def _answer(self, first: list[_Query], windows: Iterator[list[_Query]]) -> None:
        """Let the engine answer; while it has a window of queries, a thread makes the next one."""
        started = monotonic()
        with closing(self.load_engine()) as engine:
            self.facts.startup_seconds = monotonic() - started
            log.info("generate: the engine started in %.1f s", self.facts.startup_seconds)
            started = monotonic()
            try:
                # Not before the engine has started: it may fork.
                with closing(ahead(windows)) as following:
                    queries = chain(first, chain.from_iterable(following))
                    self._pass(engine, queries, initial=self.facts.reused_rows)
                if self.failed:
                    log.warning("generate: %d rows failed (%s), second try", len(self.failed), self._reasons())
                    self.facts.retried_rows = len(self.failed)
                    retries, self.failed, self._retries = sorted(self._retries.items()), {}, {}
                    self._pass(engine, (query for _, query in retries), initial=self.facts.rows - len(retries))
            finally:
                self.facts.generate_seconds = monotonic() - started
                self.facts.gpu_memory_mib = gpu_memory_mib()

    def _pass(self, engine: Engine, queries: Iterable[_Query], initial: int) -> None:
        in_flight: dict[str, _Query] = {}
        started, tokens = monotonic(), 0
        with closing(self._completions(engine, queries, in_flight)) as completions:
            bar = progress(completions, total=self.facts.rows, desc="generate", initial=initial)
            for done, completion in enumerate(bar, start=initial + 1):
                self._record(completion, in_flight.pop(completion.id))
                tokens += completion.response_tokens
                bar.total = self.facts.rows - self.facts.dropped_rows
                failed = f", {len(self.failed)} failed" if self.failed else ""
                rate = tokens / max(monotonic() - started, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s{failed}", refresh=False)
                self.track(done, bar.total, rate)

    def _completions(
        self, engine: Engine, queries: Iterable[_Query], in_flight: dict[str, _Query]
    ) -> GeneratorOf[Completion, None, None]:
        def prompts() -> Iterator[Prompt]:
            for query in queries:
                in_flight[query.prompt.id] = query
                yield query.prompt

        yield from engine.generate(prompts(), self.sampling)

    def _record(self, completion: Completion, query: _Query) -> None:
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
        self.facts.prompt_tokens += len(query.prompt.token_ids)
        self.facts.response_tokens += completion.response_tokens

    def _look_at(self, row: dict[str, Any]) -> None:
        if self.look is None or self.facts.computed_rows >= FIRST_ROWS:
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


def _row(query: _Query, response: str, finish_reason: str, error: str | None = None) -> dict[str, Any]:
    return {
        "id": query.prompt.id,
        "response": response,
        "finish_reason": finish_reason,
        "prompt_tokens": len(query.prompt.token_ids),
        "response_tokens": 0,
        "error": error,
        "truncated": query.truncated,
        "control_tokens": query.control_tokens,
        "thinking": False,
        "prompt_hash": _prompt_hash(query.prompt.token_ids),
    }


def _prompt_hash(token_ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.sha256(array("q", token_ids).tobytes()).digest()[:8]) >> 1


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row, below 2**63: the same in every batch and every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8]) >> 1


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
