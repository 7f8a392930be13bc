"""The engines by name. Adding one = one file beside this one, one entry here, one name in `EngineName`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.backbone import BackboneParams, DType
from pipeline.errors import EngineError

if TYPE_CHECKING:
    from pipeline.engines.base import Engine

EngineName = Literal["vllm", "transformers", "echo"]


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
    from pipeline.engines import echo_engine, transformers_engine, vllm_engine

    match name:
        case "vllm":
            return EngineFacts(vllm_engine.VERSION, vllm_engine.SPEED_OPTIONS)
        case "transformers":
            return EngineFacts(transformers_engine.VERSION, transformers_engine.SPEED_OPTIONS)
        case "echo":
            return EngineFacts(echo_engine.VERSION, echo_engine.SPEED_OPTIONS, stub=True)


def prepare_environment(name: EngineName) -> None:
    """Set the environment variables of the engine `name`; to be called before anything imports torch."""
    from pipeline.engines import vllm_engine

    if name == "vllm":
        vllm_engine.prepare_environment()


def build_engine(
    name: EngineName,
    backbone: BackboneParams,
    *,
    dtype: DType,
    max_prompt_tokens: int,
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
) -> "Engine":
    """Load the engine `name` with the backbone; `contextlib.closing` frees it.

    Args:
        name: which engine.
        backbone: the model that answers.
        dtype: precision of its weights.
        max_prompt_tokens: longest prompt that will come.
        max_new_tokens: longest answer that will be asked for.
        options: the engine's own options (params key `generate.options`).

    Raises:
        EngineError: the engine is not installed, refuses an option, or cannot start.
        BackboneError: the backbone cannot be loaded.
    """
    from pipeline.engines.checks import context_length, load_config
    from pipeline.engines.echo_engine import EchoEngine
    from pipeline.engines.transformers_engine import TransformersEngine
    from pipeline.engines.vllm_engine import VllmEngine

    backbone = backbone.model_copy(update={"dtype": dtype})
    max_model_len = context_length(backbone, load_config(backbone), max_prompt_tokens, max_new_tokens)
    options = dict(options or {})
    match name:
        case "vllm":
            return VllmEngine(backbone, max_model_len=max_model_len, options=options)
        case "transformers":
            _check_options(name, options, {"batch_size"})
            return TransformersEngine.load(backbone, max_model_len=max_model_len, **options)
        case "echo":
            _check_options(name, options, {"delay"})
            return EchoEngine.load(backbone, **options)


def _check_options(name: str, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise EngineError(
            f"generate.options: engine '{name}' has no option {', '.join(unknown)} (known: {', '.join(sorted(known))})"
        )
