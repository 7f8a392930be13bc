"""Soft prompts to text by vLLM, for many of them: they go in as prompt embeddings, continuously batched.

vLLM has the backbone of its own beside the one that embeds, in a process of its own on a GPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.backbone import BackboneParams
from pipeline.engines.base import Completion, Sampling, SoftPrompt
from pipeline.errors import EngineError
from pipeline.lens.decoding import MAX_NEW_TOKENS, Decoder
from pipeline.runtime import progress

if TYPE_CHECKING:
    import numpy as np

    from pipeline.engines.vllm_engine import VllmEngine

# vLLM gives vectors the placeholder token 0; with prefixes shared, one row must never be taken for another.
_OPTIONS = {"enable_prompt_embeds": True, "enable_prefix_caching": False}


@contextmanager
def vllm_decoder(
    backbone: BackboneParams,
    *,
    compression_tokens: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    options: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> Iterator[Decoder]:
    """A decoder by vLLM, stopped on leaving. As `decode_soft_prompts`, it is greedy and ends at the backbone's EOS.

    Args:
        backbone: the encoder's, in the dtype to decode in.
        compression_tokens: n of the soft prompts `[B, n, d]`.
        max_new_tokens: of an answer at most.
        options: arguments of vLLM's `EngineArgs`, over the automatic choices.
        show_progress: show a bar.

    Raises:
        EngineError: vLLM is not installed, cannot start, or refuses a row.
    """
    from pipeline.engines.vllm_choices import token_bytes
    from pipeline.engines.vllm_engine import VllmEngine

    engine = VllmEngine(
        backbone,
        max_model_len=compression_tokens + max_new_tokens,
        options={**_OPTIONS, **(options or {})},
        per_token=token_bytes(_text_config(backbone), backbone.dtype),
    )
    with closing(engine):
        yield lambda soft_prompts: _decode(engine, backbone, soft_prompts, max_new_tokens, show_progress)


def _text_config(backbone: BackboneParams) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        backbone.name, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
    )
    return config.get_text_config()


def _decode(
    engine: "VllmEngine",
    backbone: BackboneParams,
    soft_prompts: "np.ndarray[Any, Any]",
    max_new_tokens: int,
    show_progress: bool,
) -> list[str]:
    import torch

    dtype = getattr(torch, backbone.dtype)
    prompts = (SoftPrompt(str(row), torch.tensor(each).to(dtype)) for row, each in enumerate(soft_prompts))
    answers = engine.generate(prompts, Sampling(max_new_tokens))
    if show_progress:
        answers = iter(progress(answers, total=len(soft_prompts), desc="decode"))
    return _in_order(answers, len(soft_prompts))


def _in_order(completions: Iterable[Completion], count: int) -> list[str]:
    found = [""] * count
    for completion in completions:
        if completion.finish_reason == "error":
            raise EngineError(f"vLLM cannot decode soft prompt {completion.id}: {completion.error}")
        found[int(completion.id)] = completion.text.strip()
    return found
