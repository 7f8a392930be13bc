"""vLLM on a Ray cluster, through Ray Data's batch inference: one engine a GPU, or one over several.

Chunks of prompts are sent while earlier ones are worked on, and answers return chunk by chunk; the engines stay up
from the first prompt to the last.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any, ClassVar, Self

from pipeline.backbone.loading import BackboneParams, load_config, load_tokenizer
from pipeline.core.errors import EngineError, describe
from pipeline.core.schemas import FinishReason
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.checks import split_fitting, stop_tokens
from pipeline.generate.engines.ray_cluster import (
    Connection,
    Layout,
    RayOptions,
    choose_layout,
    import_ray,
    own_sigterm,
    processor_config,
    split_options,
)
from pipeline.generate.engines.vllm import VllmEngine
from pipeline.parallel.reaper import Reaper

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception)\b")


class RayEngine:
    """Feeds one endless data set and reads its answers."""

    VERSION: ClassVar[int] = 1
    SPEED_OPTIONS: ClassVar[frozenset[str]] = VllmEngine.SPEED_OPTIONS | frozenset(RayOptions.model_fields)

    def __init__(
        self, backbone: BackboneParams, options: RayOptions, arguments: Mapping[str, Any], *, max_model_len: int
    ) -> None:
        """Connect to Ray or start it, start the engines and let one of them answer a token.

        Args:
            backbone: the model, in the dtype it runs in; a folder must have the same path on every machine.
            options: of the cluster.
            arguments: of vLLM's `EngineArgs`.
            max_model_len: positions of a prompt and its answer together.

        Raises:
            EngineError: Ray cannot be reached, or no engine starts.
        """
        started = monotonic()
        self._max_model_len = max_model_len
        self._timeout, self._chunk_rows = options.timeout_seconds, options.chunk_rows
        self._stops = stop_ids(backbone)
        self._reaper, self._connection = Reaper(), Connection()
        try:
            with own_sigterm():
                self._connection.open(options)
                self._layout = choose_layout(self._connection.resources(), options, arguments)
                self._start(backbone, options, arguments)
        except BaseException:
            self.close()
            raise
        log.info("engine ray: %d engines, the first up in %.0f s", self._layout.replicas, monotonic() - started)

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        """Connect to Ray and start the engines; options are `RayOptions` and arguments of vLLM's `EngineArgs`."""
        import_ray()
        options, arguments = split_options(setup.options)
        arguments |= {"tensor_parallel_size": setup.tensor_parallel}
        return cls(setup.backbone, options, arguments, max_model_len=setup.max_model_len)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; answers return chunk by chunk."""
        waiting = iter(prompts)
        in_flight: set[str] = set()
        while True:
            while len(in_flight) < self._layout.window_rows and (chunk := list(islice(waiting, self._chunk_rows))):
                fitting, refused = split_fitting(chunk, sampling.max_new_tokens, self._max_model_len)
                yield from refused
                self._stream.send(fitting, sampling)
                in_flight |= {prompt.id for prompt in fitting}
            if not in_flight:
                return
            for row in self._stream.receive(self._timeout):
                # A lost machine can return a row twice, and an abandoned call leaves rows behind.
                if row["id"] in in_flight:
                    in_flight.remove(row["id"])
                    yield completion(row, sampling, self._stops)

    def close(self) -> None:
        """Stop the engines, and Ray if it was started here."""
        if stream := getattr(self, "_stream", None):
            stream.close()
        self._connection.close()
        self._reaper.close()

    def _start(self, backbone: BackboneParams, options: RayOptions, arguments: Mapping[str, Any]) -> None:
        config = processor_config(backbone, self._max_model_len, self._layout, options, arguments)
        self._stream = Stream(config, self._layout, self._max_model_len)
        first = Prompt("start", [min(self._stops, default=0)], 0)
        self._stream.send([first], Sampling(max_new_tokens=1))
        while not (rows := self._stream.receive(self._timeout)):
            pass
        if reason := rows[0].get("__inference_error__"):
            raise EngineError(f"vLLM on Ray cannot answer with '{backbone.name}': {reason}")


class Stream:
    """The endless data set: chunks in, rows out. A thread reads, so that a wait can time out."""

    def __init__(self, config: Any, layout: Layout, max_tokens: int) -> None:
        """Start the data set; the engines of `config` start with it."""
        import ray

        from pipeline.generate.engines import ray_feed

        ray_feed.ship()
        self._feed: Any = ray.remote(num_cpus=0)(ray_feed.Feed).remote()
        self._chunk_rows, self._sent = layout.chunk_rows, 0
        self._block_bytes = ray_feed.block_bytes(layout.chunk_rows, max_tokens)
        self._open: dict[int, int] = {}
        self._received: SimpleQueue[list[dict[str, Any]] | Exception] = SimpleQueue()
        self._closing = Event()
        batches = self._batches(config)
        self._thread = Thread(target=self._read, args=[batches], name="ray-answers", daemon=True)
        self._thread.start()

    def send(self, prompts: list[Prompt], sampling: Sampling) -> None:
        """Send at most `chunk_rows` prompts."""
        from pipeline.generate.engines.ray_feed import chunk_table

        if not prompts:
            return
        rows = [row_of(prompt, self._sent, sampling) for prompt in prompts]
        self._feed.put.remote(self._sent, chunk_table(rows, self._chunk_rows, self._block_bytes))
        self._open[self._sent] = len(rows)
        self._sent += 1

    def receive(self, timeout: float) -> list[dict[str, Any]]:
        """The next block of answered rows, without padding.

        Raises:
            EngineError: the data set broke, or nothing arrived in `timeout` seconds.
        """
        try:
            received = self._received.get(timeout=timeout)
        except Empty:
            raise EngineError(
                f"Ray gave no answer for {timeout:g} s. `ray status` shows whether the cluster has what the engines "
                "wait for",
                argument="options.timeout_seconds",
            ) from None
        if isinstance(received, Exception):
            raise EngineError(f"Ray stopped: {last_error(received)} (its logs are in its session folder)") from received
        rows = [row for row in received if row["id"]]
        self._acknowledge(rows)
        return rows

    def close(self) -> None:
        """End the data set, which stops its engines."""
        self._closing.set()
        self._feed.put.remote(self._sent, None)
        self._thread.join(CLOSE_SECONDS)

    def _acknowledge(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            number = int(row["chunk"])
            self._open[number] = self._open.get(number, 0) - 1
            if self._open[number] == 0:
                del self._open[number]
                self._feed.answered.remote(number)

    def _batches(self, config: Any) -> Iterator[Any]:
        from ray.data import DataContext, read_datasource
        from ray.data.llm import build_processor

        from pipeline.generate.engines import ray_feed

        context = DataContext.get_current()
        context.target_max_block_size = self._block_bytes
        context.enable_progress_bars = False
        # Its own CPU share keeps Ray Data from merging this step with the reading: rows would wait for a full block.
        process = build_processor(
            config,
            preprocess=ray_feed.before,
            postprocess=ray_feed.after,
            preprocess_map_kwargs={"num_cpus": 0.5},
        )
        source = read_datasource(ray_feed.Prompts(self._feed), override_num_blocks=1, num_cpus=0.1)
        # Prefetching would hold the last block back until another one comes.
        return iter(process(source).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    def _read(self, batches: Iterator[Any]) -> None:
        try:
            for batch in batches:
                self._received.put(batch.to_pylist())
                if self._closing.is_set():
                    break
            else:
                raise RuntimeError("the data set ended")
        except Exception as error:
            self._received.put(error)


def row_of(prompt: Prompt, chunk: int, sampling: Sampling) -> dict[str, Any]:
    """A prompt as a row of the feed."""
    arguments = json.dumps(sampling.arguments(prompt.seed))
    return {"id": prompt.id, "chunk": chunk, "tokenized_prompt": prompt.token_ids, "sampling": arguments}


def completion(row: Mapping[str, Any], sampling: Sampling, stops: Collection[int]) -> Completion:
    """An answered row. Ray Data drops vLLM's finish reason; it follows from the answer's length and last token."""
    if error := row.get("__inference_error__"):
        return Completion.failed(row["id"], (error.strip().splitlines() or ["no reason given"])[0])
    tokens = int(row["tokens"])  # a float where another row of the block has an error
    full = tokens >= sampling.max_new_tokens and row["last"] not in stops
    reason: FinishReason = "length" if full else "stop"
    return Completion(row["id"], row["text"], reason, tokens)


def last_error(error: Exception) -> str:
    """The innermost error of Ray's, which is the last in its message, below the traceback."""
    lines = str(error).strip().splitlines()
    starts = [index for index, line in enumerate(lines) if ERROR_LINE.match(line)]
    if not starts:
        return describe(error)
    return " ".join(line.strip() for line in lines[starts[-1] : starts[-1] + 2])[:500]


def stop_ids(backbone: BackboneParams) -> frozenset[int]:
    """The tokens at which vLLM ends an answer: EOS of the tokenizer, the config and the generation config."""
    from transformers import GenerationConfig

    eos = [load_tokenizer(backbone).eos_token_id, load_config(backbone).eos_token_id]
    try:
        eos.append(GenerationConfig.from_pretrained(backbone.name, revision=backbone.revision).eos_token_id)
    except OSError:
        log.debug("'%s' has no generation config", backbone.name)
    return frozenset(stop_tokens(*eos))
