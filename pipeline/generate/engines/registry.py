"""The engines by name. Adding one takes a file in this folder and an entry in `ENGINES`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from pipeline.backbone.loading import BackboneParams, DType, load_config
from pipeline.core.errors import EngineError, nested_in
from pipeline.generate.engines.base import Engine, EngineSetup, LoadableEngine
from pipeline.generate.engines.checks import context_length
from pipeline.generate.engines.pool import ParallelEngine
from pipeline.generate.engines.vllm_defaults import token_bytes
from pipeline.parallel.devices import Count, split_devices, visible_gpus, worker_count


@dataclass(frozen=True)
class EngineEntry:
    """What is known of an engine before it starts.

    Attributes:
        path: its class, `module:name`; imported at first use.
        runs_on: "machine": processes here, which can run side by side; "cluster": processes that it places itself;
            "endpoint": a server, so that no GPU here is busy.
        splits: it can split a model over GPUs.
        batch_invariant: it has kernels whose answers do not depend on the batch.
        environment: `module:name` of the function that sets its environment variables.
        stub: why its answers are not real ones, for the record of the run.
    """

    path: str
    runs_on: Literal["machine", "cluster", "endpoint"] = "machine"
    splits: bool = False
    batch_invariant: bool = False
    environment: str = ""
    stub: str = ""

    def engine(self) -> type[LoadableEngine]:
        found: type[LoadableEngine] = resolve_name(self.path)
        return found


ENGINES: Mapping[str, EngineEntry] = {
    "vllm": EngineEntry(
        "pipeline.generate.engines.vllm:VllmEngine",
        splits=True,
        batch_invariant=True,
        environment="pipeline.generate.engines.vllm_environment:prepare_environment",
    ),
    "ray": EngineEntry("pipeline.generate.engines.ray:RayEngine", runs_on="cluster", splits=True),
    "openai": EngineEntry("pipeline.generate.engines.openai:OpenAIEngine", runs_on="endpoint"),
    "transformers": EngineEntry("pipeline.generate.engines.transformers:TransformersEngine"),
    "echo": EngineEntry("pipeline.generate.engines.echo:EchoEngine", stub="answers are the prompts themselves"),
}


def _known(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"must be one of {', '.join(ENGINES)}")
    return name


EngineName = Annotated[str, AfterValidator(_known)]


def prepare_environment(engine: str) -> None:
    """Set the environment variables of an engine; to be called before anything imports torch."""
    if path := ENGINES[engine].environment:
        resolve_name(path)()


def build_engine(
    engine: str,
    backbone: BackboneParams,
    *,
    dtype: DType,
    max_prompt_tokens: int,
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
    data_parallel: Count = 1,
    batch_invariant: bool = False,
) -> Engine:
    """Load an engine with the backbone; `contextlib.closing` frees it.

    Args:
        engine: its name in `ENGINES`.
        backbone: the model that answers; `dtype` is the precision of its weights here.
        max_prompt_tokens, max_new_tokens: the longest prompt and answer.
        data_parallel: engines side by side, a process each; "auto": one for each group of GPUs, one on a CPU.
        options, tensor_parallel, batch_invariant: see `EngineSetup`.

    Raises:
        EngineError: the engine is not installed, refuses an option or cannot start, or there are too few GPUs.
        BackboneError: the backbone cannot be loaded.
    """
    backbone = backbone.model_copy(update={"dtype": dtype})
    config = load_config(backbone)
    max_model_len = context_length(backbone, config, max_prompt_tokens, max_new_tokens)
    count = _processes(engine, data_parallel, tensor_parallel, batch_invariant)
    setup = EngineSetup(
        backbone,
        max_model_len=max_model_len,
        options=dict(options or {}),
        token_bytes=token_bytes(config, dtype),
        tensor_parallel=tensor_parallel,
        batch_invariant=batch_invariant,
        memory_share=1 / count,
    )
    load = partial(_load, engine, setup)
    return load() if count == 1 else ParallelEngine(load, split_devices(count, tensor_parallel))


def _processes(engine: str, data_parallel: Count, tensor_parallel: int, batch_invariant: bool) -> int:
    """How many engine processes to start; raises EngineError if the engine or the machine cannot do it."""
    entry = ENGINES[engine]
    if tensor_parallel > 1 and not entry.splits:
        message = f"{tensor_parallel}, but engine '{engine}' uses one GPU: set it to 1"
        raise EngineError(message, argument="tensor_parallel")
    if batch_invariant and not entry.batch_invariant:
        able = ", ".join(name for name, other in ENGINES.items() if other.batch_invariant)
        raise EngineError(f"only for engine {able}, not for '{engine}': set it to false", argument="batch_invariant")
    if entry.runs_on != "machine":
        if data_parallel not in (1, "auto"):
            message = f"{data_parallel}, but options of engine '{engine}' set how much runs at once: set it to auto"
            raise EngineError(message, argument="data_parallel")
        return 1
    gpus = len(visible_gpus())
    if tensor_parallel > max(gpus, 1):
        message = f"{tensor_parallel}, but {gpus} GPU(s) are visible (CUDA_VISIBLE_DEVICES)"
        raise EngineError(message, argument="tensor_parallel")
    if entry.stub and data_parallel == "auto":
        return 1
    with nested_in(names={"processes": "data_parallel"}):
        return worker_count(data_parallel, gpus_each=tensor_parallel, error=EngineError)


def _load(engine: str, setup: EngineSetup) -> Engine:
    return ENGINES[engine].engine().load(setup)
