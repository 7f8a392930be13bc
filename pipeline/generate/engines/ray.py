"""vLLM on a Ray cluster, by Ray Data's batch inference.

    rows in Parquet files -> prompts, on CPUs -> vLLM, one engine a GPU or over several -> answers, block by block

Ray Data keeps between `min_replicas` and `replicas` engines up while there are rows, and repeats the blocks of a
machine that is lost. Every machine needs this package, the model, and the work folder under the same path.
"""

import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import Field

from pipeline.core.config import Params
from pipeline.core.errors import EngineError
from pipeline.core.schemas import FinishReason
from pipeline.generate.engines.base import Completion, EngineSetup, MakeQueries, Prompt, Query, Sampling
from pipeline.generate.engines.checks import parse_options, too_long
from pipeline.generate.engines.vllm import VllmEngine, check_arguments, fixed_arguments, known_arguments, stop_ids
from pipeline.generate.engines.vllm_defaults import unseen_defaults
from pipeline.generate.engines.vllm_environment import QUIET, SHARED_CPU
from pipeline.parallel.prefetch import ahead
from pipeline.parallel.ray_cluster import connected, last_error, quiet, worker_environment

log = logging.getLogger(__name__)

# Logical CPUs that read rows, cut blocks and make prompts; with fewer Ray Data waits for ever.
SPARE_CPUS = 3
# Each stage of `ray.data.llm` passes on a row with an error, so it reaches no engine.
ERROR = "__inference_error__"
# `query` is a pickled `Query`: Ray Data makes floats of integers that share a column with a null.
ROWS = pa.schema(
    {"number": pa.int64(), "tokenized_prompt": pa.list_(pa.int64()), "query": pa.binary(), ERROR: pa.string()}
)


class RayOptions(Params):
    """The options that are not vLLM's."""

    address: str | None = Field(default=None, description="auto or host:port; null = $RAY_ADDRESS or a local Ray")
    replicas: int | None = Field(default=None, ge=1, description="most engines; null = as many as the GPUs allow")
    min_replicas: int | None = Field(default=None, ge=1, description="least engines; null = replicas")
    chunk_rows: int = Field(default=32, ge=1, description="rows that go to an engine and come back together")
    num_cpus: int | None = Field(default=None, ge=1, description="logical CPUs of a local Ray; null = enough")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of the engines")
    timeout_seconds: float = Field(default=3600.0, gt=0, description="longest wait for the next answers")


@dataclass
class RayEngine:
    """Answers by a data set that flows through the engines, which each call starts.

    Attributes:
        process: by the sampling: from a data set of `ROWS` to one of answers as `after` gives them.
        stops: tokens that end an answer.
        max_model_len: positions of a prompt and its answer together.
        prompt_makers: most actors that make prompts.
        connection: to Ray; closed with the engine.
    """

    VERSION: ClassVar[int] = 1
    SPEED_OPTIONS: ClassVar[frozenset[str]] = VllmEngine.SPEED_OPTIONS | frozenset(RayOptions.model_fields)

    process: Callable[[Sampling], Callable[[Any], Any]]
    stops: Collection[int]
    max_model_len: int
    options: RayOptions
    prompt_makers: int = 1
    connection: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        """Connect to Ray or start it; options are `RayOptions` and arguments of vLLM's `EngineArgs`."""
        options, arguments = split_options(setup.options)
        arguments |= {"tensor_parallel_size": setup.tensor_parallel}
        devices = setup.tensor_parallel * int(arguments.get("pipeline_parallel_size", 1))
        cpus = max(os.cpu_count() or 1, (options.replicas or 1) * devices + SPARE_CPUS)
        here: dict[str, Any] = {"address": options.address, "cpus": options.num_cpus or cpus}
        with ExitStack() as stack:
            found = stack.enter_context(connected(error=EngineError, argument="options.address", **here))
            replicas = choose_replicas(found, options, devices)
            on_gpu = bool(found.get("GPU"))
            arguments = unseen_defaults(on_gpu) | arguments | fixed_arguments(setup.backbone, setup.max_model_len)
            process = partial(vllm_processor, setup.backbone.name, arguments, options, replicas, devices, on_gpu)
            makers = max(1, (int(found["CPU"]) - replicas[1] * devices - SPARE_CPUS) // 2)
            return cls(process, stop_ids(setup.backbone), setup.max_model_len, options, makers, stack.pop_all())

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; all prompts are taken before the first answer comes."""
        import ray

        queries = list(map(Query, prompts))
        if queries:
            rows = rows_of(queries, range(len(queries)), sampling, self.max_model_len)
            yield from (completion for _, completion in self._answers(ray.data.from_arrow(rows), sampling))

    def answer(self, folder: Path, make: MakeQueries, sampling: Sampling) -> Iterator[tuple[Query, Completion]]:
        """See `TextEngine.answer`."""
        import ray

        texts = ray.data.read_parquet(str(folder.resolve()), ray_remote_args={"num_cpus": 0.5})
        rows = texts.map_batches(
            RowMaker,
            fn_constructor_args=(make, sampling, self.max_model_len),
            batch_size=self.options.chunk_rows,
            batch_format="pyarrow",
            concurrency=(1, self.prompt_makers),
        )
        yield from self._answers(rows, sampling)

    def close(self) -> None:
        """Stop what still runs; leave the cluster, or stop the Ray that was started here."""
        self.connection.close()

    def _answers(self, rows: Any, sampling: Sampling) -> Iterator[tuple[Query, Completion]]:
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False
        answered = self.process(sampling)(rows.repartition(target_num_rows_per_block=self.options.chunk_rows))
        # A block that Ray itself prefetched would lie here uncommitted.
        blocks = answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            for row in once(ahead(blocks, self.options.timeout_seconds)):
                query: Query = pickle.loads(row["query"])
                yield query, completion_of(row, query.prompt.id, sampling, self.stops)
        except TimeoutError as late:
            message = f"Ray: {late}; `ray status` shows what the engines wait for"
            raise EngineError(message, argument="options.timeout_seconds") from None
        except Exception as error:  # Ray's own kinds, and whatever an engine raises as it starts
            raise EngineError(f"Ray stopped: {last_error(error)} (its logs are in its session folder)") from error


class RowMaker:
    """An actor that makes rows of `ROWS` of ids and texts."""

    def __init__(self, make: MakeQueries, sampling: Sampling, max_model_len: int) -> None:
        self._make, self._limits = make, (sampling, max_model_len)

    def __call__(self, texts: pa.Table) -> pa.Table:
        return rows_of(self._make(texts), texts["number"].to_pylist(), *self._limits)


def rows_of(queries: Iterable[Query], numbers: Iterable[int], sampling: Sampling, max_model_len: int) -> pa.Table:
    """Queries as a table of `ROWS`; those that no engine shall answer have an error."""

    def row(query: Query, number: int) -> dict[str, Any]:
        tokens = query.prompt.token_ids
        reason = query.refused or too_long(len(tokens), sampling.max_new_tokens, max_model_len) or ""
        return {"number": number, "tokenized_prompt": tokens, "query": pickle.dumps(query), ERROR: reason}

    return pa.Table.from_pylist(list(map(row, queries, numbers)), schema=ROWS)


def once(blocks: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    """Each row of the blocks at its first delivery, by `number`: Ray repeats blocks of a machine that it lost."""
    came = bytearray()
    for block in blocks:
        for row in block.to_pylist():
            number = int(row["number"])
            came.extend(bytes(max(0, number + 1 - len(came))))
            if not came[number]:
                came[number] = 1
                yield row


def before(row: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """A row of `ROWS` as `ray.data.llm` takes it."""
    return row | {"sampling_params": sampling.arguments(pickle.loads(row["query"]).prompt.seed)}


def after(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are kept of an answered row; a row with an error keeps all."""
    tokens = [*row["generated_tokens"]]
    kept = {"number": row["number"], "query": row["query"], "text": row["generated_text"]}
    return {**kept, "tokens": len(tokens), "last": int(tokens[-1]) if tokens else -1}


def completion_of(row: Mapping[str, Any], row_id: str, sampling: Sampling, stops: Collection[int]) -> Completion:
    """The completion of an answered row. Ray drops vLLM's finish reason; it follows from length and last token."""
    if error := row.get(ERROR):
        return Completion.failed(row_id, (error.strip().splitlines() or ["no reason given"])[0])
    tokens = int(row["tokens"])  # a float where another row of the block has an error
    reason: FinishReason = "length" if tokens >= sampling.max_new_tokens and row["last"] not in stops else "stop"
    return Completion(row_id, row["text"], reason, tokens)


def split_options(options: Mapping[str, Any]) -> tuple[RayOptions, dict[str, Any]]:
    """Options as Ray's and vLLM's; raises EngineError if one is unknown, mistyped, or follows from other params."""
    arguments = {name: value for name, value in options.items() if name not in RayOptions.model_fields}
    check_arguments(arguments, known_arguments() if arguments else (), RayOptions.model_fields)
    return parse_options({name: options[name] for name in options.keys() - arguments}, RayOptions), arguments


def choose_replicas(resources: Mapping[str, float], options: RayOptions, devices: int) -> tuple[int, int]:
    """Least and most engines, of `devices` each, on a cluster with these resources; EngineError if they do not fit."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    most = options.replicas or max(gpus // devices, options.min_replicas or 1)
    least = options.min_replicas or most
    if least > most:
        raise EngineError(f"{least}, above replicas ({most})", argument="options.min_replicas")
    taken = least * devices
    if 0 < gpus < taken or cpus < taken + SPARE_CPUS:
        message = f"{least} engines take {taken} GPUs and {taken + SPARE_CPUS} logical CPUs, Ray has {gpus} and {cpus}"
        how = "lower it, tensor_parallel or replicas, or raise num_cpus of a local Ray"
        raise EngineError(f"{message}: {how}", argument="options.min_replicas")
    log.info("engine ray: %d to %d engines (%d GPUs, %d for an engine)", least, most, gpus, devices)
    return least, most


def vllm_processor(
    name: str,
    arguments: Mapping[str, Any],
    options: RayOptions,
    replicas: tuple[int, int],
    devices: int,
    on_gpu: bool,
    sampling: Sampling,
) -> Any:
    """`ray.data.llm` with engines of these arguments: token ids in, and no stage but the engine."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    quiet()
    threads = None if on_gpu else max(1, (os.cpu_count() or 1) // replicas[0])
    variables = QUIET | worker_environment(threads) | ({} if on_gpu else SHARED_CPU) | options.env
    config = vLLMEngineProcessorConfig(
        model_source=str(Path(name).resolve()) if Path(name).is_dir() else name,
        engine_kwargs=dict(arguments),
        batch_size=options.chunk_rows,
        concurrency=replicas,
        # Twice what runs at once: an engine stays busy during the last rows of a block.
        max_concurrent_batches=max(2, ceil(2 * arguments["max_num_seqs"] / options.chunk_rows)),
        placement_group_config={"bundles": [{"CPU": 1, "GPU": int(on_gpu)}] * devices},
        runtime_env={"env_vars": variables},
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    little = {"preprocess_map_kwargs": {"num_cpus": 0.5}, "postprocess_map_kwargs": {"num_cpus": 0.5}}
    return build_processor(config, preprocess=partial(before, sampling=sampling), postprocess=after, **little)
