"""vLLM on a Ray cluster, through Ray Data's batch inference: one engine a GPU, or one over several.

Chunks of prompts go out while earlier ones are worked on, and answers come back chunk by chunk; the engines stay up
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
from typing import Any

from pipeline.backbone.loading import BackboneParams, load_config, load_tokenizer
from pipeline.core.errors import EngineError
from pipeline.core.schemas import FinishReason
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.checks import describe, too_long
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
from pipeline.generate.engines.vllm import SPEED_OPTIONS as VLLM_SPEED_OPTIONS
from pipeline.parallel.reaper import Reaper

log = logging.getLogger(__name__)

VERSION = 1
SPEED_OPTIONS = VLLM_SPEED_OPTIONS | frozenset(RayOptions.model_fields)
CLOSE_SECONDS = 10.0
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception)\b")


class RayEngine:
    """Feeds one endless data set and reads its answers."""

    def __init__(
        self, backbone: BackboneParams, *, max_model_len: int, options: Mapping[str, Any], tensor_parallel: int = 1
    ) -> None:
        """Connect to Ray or start it, start the engines and let one of them answer a token.

        Args:
            backbone: the model, in the dtype it runs in; a folder must be there under the same path on every machine.
            max_model_len: positions of a prompt and its answer together.
            options: `RayOptions`, and arguments of vLLM's `EngineArgs`.
            tensor_parallel: GPUs that each engine splits the model over.

        Raises:
            EngineError: Ray is not installed or cannot be reached, an option is wrong, or no engine starts.
        """
        started = monotonic()
        import_ray()
        ours, arguments = split_options(options)
        arguments |= {"tensor_parallel_size": tensor_parallel}
        self._max_model_len = max_model_len
        self._timeout, self._chunk_rows = ours.timeout_seconds, ours.chunk_rows
        self._stops = stop_ids(backbone)
        self._reaper, self._connection = Reaper(), Connection()
        try:
            with own_sigterm():
                self._connection.open(ours)
                self._layout = choose_layout(self._connection.resources(), ours, arguments)
                self._start(backbone, ours, arguments)
        except BaseException:
            self.close()
            raise
        log.info("engine ray: %d engines, the first up in %.0f s", self._layout.replicas, monotonic() - started)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; answers come chunk by chunk."""
        waiting = iter(prompts)
        in_flight: set[str] = set()
        while True:
            while len(in_flight) < self._layout.window_rows and (chunk := list(islice(waiting, self._chunk_rows))):
                fitting = []
                for prompt in chunk:
                    if reason := too_long(len(prompt.token_ids), sampling.max_new_tokens, self._max_model_len):
                        yield Completion(prompt.id, "", "error", 0, reason)
                    else:
                        fitting.append(prompt)
                self._stream.send(fitting, sampling)
                in_flight |= {prompt.id for prompt in fitting}
            if not in_flight:
                return
            for row in self._stream.receive(self._timeout):
                # A machine that was lost can bring a row twice, and an abandoned call leaves rows behind.
                if row["id"] in in_flight:
                    in_flight.remove(row["id"])
                    yield completion(row, sampling, self._stops)

    def close(self) -> None:
        """Stop the engines, and Ray if it was started here."""
        if stream := getattr(self, "_stream", None):
            stream.close()
        self._connection.close()
        self._reaper.close()

    def _start(self, backbone: BackboneParams, ours: RayOptions, arguments: Mapping[str, Any]) -> None:
        config = processor_config(backbone, self._max_model_len, self._layout, ours, arguments)
        self._stream = Stream(config, self._layout, self._max_model_len)
        first = Prompt("start", [min(self._stops, default=0)], 0)
        self._stream.send([first], Sampling(max_new_tokens=1))
        while not (rows := self._stream.receive(self._timeout)):
            pass
        if reason := rows[0].get("__inference_error__"):
            raise EngineError(f"vLLM on Ray cannot answer with '{backbone.name}': {reason}")


class Stream:
    """The endless data set: chunks in, rows out. A thread reads, so that a wait can end."""

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
        """Hand over at most `chunk_rows` prompts."""
        from pipeline.generate.engines.ray_feed import chunk_table

        if not prompts:
            return
        rows = [row_of(prompt, self._sent, sampling) for prompt in prompts]
        self._feed.put.remote(self._sent, chunk_table(rows, self._chunk_rows, self._block_bytes))
        self._open[self._sent] = len(rows)
        self._sent += 1

    def receive(self, timeout: float) -> list[dict[str, Any]]:
        """Some rows that came back, at least one block of them; padding is left out.

        Raises:
            EngineError: the data set broke, or nothing came in `timeout` seconds.
        """
        try:
            received = self._received.get(timeout=timeout)
        except Empty:
            raise EngineError(
                f"Ray gave no answer for {timeout:g} s (generate.options.timeout_seconds). `ray status` shows whether "
                "the cluster has what the engines wait for"
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
    params: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.temperature:
        params["seed"] = prompt.seed
    return {"id": prompt.id, "chunk": chunk, "tokenized_prompt": prompt.token_ids, "sampling": json.dumps(params)}


def completion(row: Mapping[str, Any], sampling: Sampling, stops: Collection[int]) -> Completion:
    """An answered row. Ray Data does not hand on why vLLM stopped; it follows from the answer's length and end."""
    if error := row.get("__inference_error__"):
        return Completion(row["id"], "", "error", 0, error.splitlines()[0])
    tokens = int(row["tokens"])  # a float, where a row beside it has an error
    full = tokens >= sampling.max_new_tokens and row["last"] not in stops
    reason: FinishReason = "length" if full else "stop"
    return Completion(row["id"], row["text"], reason, tokens)


def last_error(error: Exception) -> str:
    """What an error of Ray is about: the innermost one, which stands last in its message below the traceback."""
    lines = str(error).strip().splitlines()
    starts = [index for index, line in enumerate(lines) if ERROR_LINE.match(line)]
    if not starts:
        return describe(error)
    return " ".join(line.strip() for line in lines[starts[-1] : starts[-1] + 2])[:500]


def stop_ids(backbone: BackboneParams) -> frozenset[int]:
    """The tokens at which vLLM ends an answer: EOS of the tokenizer, the config and the generation config."""
    from transformers import GenerationConfig

    named = [load_tokenizer(backbone).eos_token_id, load_config(backbone).eos_token_id]
    try:
        named.append(GenerationConfig.from_pretrained(backbone.name, revision=backbone.revision).eos_token_id)
    except OSError:
        log.debug("'%s' has no generation config", backbone.name)
    ids = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    return frozenset(token for token in ids if token is not None)
