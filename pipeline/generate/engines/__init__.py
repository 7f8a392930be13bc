"""The engines by name. Adding one = one file beside this one, one entry here, one name in `EngineName`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipeline.backbone.loading import BackboneParams, DType
from pipeline.core.errors import EngineError
from pipeline.parallel.devices import Count, places, visible_gpus, worker_count

if TYPE_CHECKING:
    from pipeline.generate.engines.base import Engine

EngineName = Literal["vllm", "ray", "openai", "transformers", "echo"]

# Engines that run on this machine, and those that can split a model over GPUs.
LOCAL = frozenset({"vllm", "transformers", "echo"})
SPLITTING = frozenset({"vllm", "ray"})


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says about itself without being loaded.

    `version` goes up when the same prompt and params may give another answer. `speed_options` are options that change
    how fast an answer comes and not which: they stay out of fingerprints and manifests. A `stub` writes no real
    answers.
    """

    version: int
    speed_options: frozenset[str]
    stub: bool = False


def engine_facts(name: EngineName) -> EngineFacts:
    """The facts of the engine `name`."""
    from pipeline.generate.engines import echo as echo_engine
    from pipeline.generate.engines import openai as openai_engine
    from pipeline.generate.engines import ray as ray_engine
    from pipeline.generate.engines import transformers as transformers_engine
    from pipeline.generate.engines import vllm as vllm_engine

    match name:
        case "vllm":
            return EngineFacts(vllm_engine.VERSION, vllm_engine.SPEED_OPTIONS)
        case "ray":
            return EngineFacts(ray_engine.VERSION, ray_engine.SPEED_OPTIONS)
        case "openai":
            return EngineFacts(openai_engine.VERSION, openai_engine.SPEED_OPTIONS)
        case "transformers":
            return EngineFacts(transformers_engine.VERSION, transformers_engine.SPEED_OPTIONS)
        case "echo":
            return EngineFacts(echo_engine.VERSION, echo_engine.SPEED_OPTIONS, stub=True)


def prepare_environment(name: EngineName) -> None:
    """Set the environment variables of the engine `name`; to be called before anything imports torch."""
    from pipeline.generate.engines import vllm_environment as vllm_machine

    if name == "vllm":
        vllm_machine.prepare_environment()


def build_engine(
    name: EngineName,
    backbone: BackboneParams,
    *,
    dtype: DType,
    max_prompt_tokens: int,
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
    data_parallel: Count = 1,
    batch_invariant: bool = False,
) -> "Engine":
    """Load the engine `name` with the backbone; `contextlib.closing` frees it.

    Args:
        name: which engine.
        backbone: the model that answers.
        dtype: precision of its weights.
        max_prompt_tokens: longest prompt that will come.
        max_new_tokens: longest answer that will be asked for.
        options: the engine's own options (params key `generate.options`).
        tensor_parallel: GPUs that each engine splits the model over.
        data_parallel: engines side by side, a process each; "auto" is one for each group of GPUs, one on a CPU.
        batch_invariant: answers do not depend on which rows share a batch.

    Raises:
        EngineError: the engine is not installed, refuses an option or cannot start, or there are too few GPUs.
        BackboneError: the backbone cannot be loaded.
    """
    from pipeline.backbone.loading import load_config
    from pipeline.generate.engines.checks import context_length
    from pipeline.generate.engines.pool import ParallelEngine
    from pipeline.generate.engines.vllm_defaults import token_bytes

    backbone = backbone.model_copy(update={"dtype": dtype})
    config = load_config(backbone)
    max_model_len = context_length(backbone, config, max_prompt_tokens, max_new_tokens)
    count = _processes(name, data_parallel, tensor_parallel, batch_invariant)
    load = partial(
        _load,
        name,
        backbone,
        max_model_len=max_model_len,
        options=dict(options or {}),
        per_token=token_bytes(config, dtype),
        tensor_parallel=tensor_parallel,
        batch_invariant=batch_invariant,
        memory_share=1 / count,
    )
    return load() if count == 1 else ParallelEngine(load, places(count, tensor_parallel))


def _processes(name: EngineName, data_parallel: Count, tensor_parallel: int, batch_invariant: bool) -> int:
    """How many engine processes to start.

    Raises:
        EngineError: the engine or the machine cannot do it.
    """
    if tensor_parallel > 1 and name not in SPLITTING:
        raise EngineError(
            f"generate.tensor_parallel is {tensor_parallel}, but engine '{name}' uses one GPU: set it to 1"
        )
    if batch_invariant and name != "vllm":
        raise EngineError(f"generate.batch_invariant is an option of engine vllm, not of '{name}': set it to false")
    if name not in LOCAL:
        if data_parallel not in (1, "auto"):
            knows = "generate.options of that engine set how much runs at once: set it to auto"
            raise EngineError(f"generate.data_parallel is {data_parallel}, but engine '{name}' runs elsewhere; {knows}")
        return 1
    gpus = len(visible_gpus())
    if tensor_parallel > max(gpus, 1):
        raise EngineError(
            f"generate.tensor_parallel is {tensor_parallel}, but {gpus} GPU(s) are visible (CUDA_VISIBLE_DEVICES)"
        )
    if name == "echo" and data_parallel == "auto":
        return 1
    return worker_count(data_parallel, gpus_each=tensor_parallel, knob="generate.data_parallel", error=EngineError)


def _load(
    name: EngineName,
    backbone: BackboneParams,
    *,
    max_model_len: int,
    options: dict[str, Any],
    per_token: int | None,
    tensor_parallel: int,
    batch_invariant: bool,
    memory_share: float,
) -> "Engine":
    """One engine, in this process."""
    from pipeline.generate.engines.checks import parse_options
    from pipeline.generate.engines.echo import EchoEngine, EchoOptions
    from pipeline.generate.engines.openai import OpenAIEngine
    from pipeline.generate.engines.ray import RayEngine
    from pipeline.generate.engines.transformers import TransformersEngine, TransformersOptions
    from pipeline.generate.engines.vllm import VllmEngine

    match name:
        case "vllm":
            return VllmEngine(
                backbone,
                max_model_len=max_model_len,
                options=options,
                per_token=per_token,
                tensor_parallel=tensor_parallel,
                batch_invariant=batch_invariant,
                memory_share=memory_share,
            )
        case "ray":
            return RayEngine(backbone, max_model_len=max_model_len, options=options, tensor_parallel=tensor_parallel)
        case "openai":
            return OpenAIEngine(backbone, max_model_len=max_model_len, options=options)
        case "transformers":
            batch_size = parse_options(options, TransformersOptions).batch_size
            return TransformersEngine.load(backbone, max_model_len=max_model_len, batch_size=batch_size)
        case "echo":
            return EchoEngine.load(backbone, delay=parse_options(options, EchoOptions).delay)
