"""Soft prompts to text, greedily, by the frozen backbone without adapters.

transformers decodes with the backbone that is loaded. vLLM loads it a second time in a process of its own, and batches
many soft prompts continuously as prompt embeddings.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError, describe
from pipeline.core.run import progress
from pipeline.generate.engines.base import Completion, EngineSetup, Sampling, SoftPrompt
from pipeline.generate.engines.transformers import greedy_config, stop_token_ids

if TYPE_CHECKING:
    import numpy as np
    from transformers import GenerationConfig

    from pipeline.encoder.inference import Encoder


log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
# Rows decoded at once, by device: the cache of soft prompts and short answers is small.
BATCH_ROWS = {"cpu": 16, "cuda": 256}
# vLLM gives vectors the placeholder token 0; with prefixes shared, one row must never be taken for another.
_VLLM_OPTIONS = {"enable_prompt_embeds": True, "enable_prefix_caching": False}

EngineName = Literal["transformers", "vllm"]

# Soft prompts float32 [B, n, d] in, an answer each out.
Decoder = Callable[["np.ndarray[Any, Any]"], list[str]]


def decode(
    encoder: "Encoder",
    texts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    instruction: str = "",
    batch_size: int | None = None,
) -> list[str]:
    """The answers that the backbone writes greedily from the soft prompts of `texts`, without seeing the texts."""
    soft = encoder.soft_prompts(texts, instruction=instruction)
    return decode_soft_prompts(encoder, soft, max_new_tokens=max_new_tokens, batch_size=batch_size)


def decode_soft_prompts(
    encoder: "Encoder",
    soft_prompts: "np.ndarray[Any, Any]",
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> list[str]:
    """As `decode`, from stored soft prompts float32 `[B, n, d]`, `batch_size` rows at once (None: by the device).

    All rows have one length and none is padded, so batches change nothing.
    """
    rows = batch_size or _batch_rows(encoder)
    starts = range(0, len(soft_prompts), rows)
    stops = stop_token_ids(encoder.model, encoder.tokenizer)
    config = greedy_config(stops, max_new_tokens)
    answers: list[str] = []
    for start in progress(starts, total=len(starts), desc="decode", unit="batch") if show_progress else starts:
        answers += _decode_batch(encoder, soft_prompts[start : start + rows], config, stops)
    return answers


@contextmanager
def open_decoder(
    engine: EngineName,
    encoder: "Encoder",
    *,
    compression_tokens: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Decoder]:
    """A decoder by the encoder's loaded backbone (`transformers`), or by vLLM in the same dtype.

    vLLM loads the folder or hub name `backbone` (None: the recorded one); raises EngineError if it cannot start.
    """
    if engine == "transformers":
        rows = _batch_rows(encoder)
        log.info("decode: %d rows at once (%s)", rows, encoder.model.device.type)
        yield partial(decode_soft_prompts, encoder, max_new_tokens=max_new_tokens, batch_size=rows)
        return
    recorded = encoder.config.backbone
    name = backbone or recorded["name"]
    params = BackboneParams(
        name=name,
        revision=recorded.get("revision") if name == recorded["name"] else None,
        dtype=str(encoder.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
    )
    with vllm_decoder(params, compression_tokens=compression_tokens, max_new_tokens=max_new_tokens) as decoder:
        yield decoder


def _batch_rows(encoder: "Encoder") -> int:
    return BATCH_ROWS.get(encoder.model.device.type, BATCH_ROWS["cuda"])


def _decode_batch(
    encoder: "Encoder", soft_prompts: "np.ndarray[Any, Any]", config: "GenerationConfig", stops: Sequence[int]
) -> list[str]:
    import torch

    model = encoder.model
    embeds = torch.tensor(soft_prompts).to(model.device, model.dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
    with torch.inference_mode():
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config).tolist()
    ends = [next((at for at, token in enumerate(row) if token in stops), len(row)) for row in found]
    answers = [row[:end] for row, end in zip(found, ends, strict=True)]
    return [text.strip() for text in encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)]


@contextmanager
def vllm_decoder(
    backbone: BackboneParams,
    *,
    compression_tokens: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    options: dict[str, Any] | None = None,
) -> Iterator[Decoder]:
    """A decoder by vLLM, greedy and ended by the backbone's EOS as `decode_soft_prompts`; stopped on leaving.

    `options` (of vLLM's `EngineArgs`) override the automatic ones. Raises EngineError if vLLM cannot start or refuses a
    row.
    """
    import torch
    from transformers import AutoConfig

    from pipeline.generate.engines.vllm import VllmEngine
    from pipeline.generate.engines.vllm_defaults import token_bytes

    config = AutoConfig.from_pretrained(
        backbone.name, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
    )
    setup = EngineSetup(
        backbone,
        max_model_len=compression_tokens + max_new_tokens,
        options={**_VLLM_OPTIONS, **(options or {})},
        token_bytes=token_bytes(config.get_text_config(), backbone.dtype),
    )
    try:
        engine = VllmEngine.load(setup)
    except EngineError as error:  # it may name an option of the stage that generates
        why = describe(error.__cause__) if error.__cause__ else error.message
        raise EngineError(f"vLLM cannot decode here ({why}): take transformers", argument="engine") from error
    dtype = getattr(torch, backbone.dtype)

    def decoder(soft_prompts: "np.ndarray[Any, Any]") -> list[str]:
        prompts = (SoftPrompt(str(row), torch.tensor(each).to(dtype)) for row, each in enumerate(soft_prompts))
        return _in_order(engine.generate(prompts, Sampling(max_new_tokens)), len(soft_prompts))

    with closing(engine):
        yield decoder


def _in_order(completions: Iterable[Completion], count: int) -> list[str]:
    found = [""] * count
    for completion in completions:
        if completion.finish_reason == "error":
            raise EngineError(f"vLLM cannot decode soft prompt {completion.id}: {completion.error}")
        found[int(completion.id)] = completion.text.strip()
    return found
