"""Soft prompts to text, greedily, by the frozen backbone: adapters embed, they never decode."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.core.run import progress
from pipeline.generate.engines.base import Completion, EngineSetup, Sampling, SoftPrompt
from pipeline.generate.engines.transformers import stop_token_ids

if TYPE_CHECKING:
    import numpy as np
    from transformers import GenerationConfig

    from pipeline.encoder.inference import Encoder
    from pipeline.generate.engines.vllm import VllmEngine


log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
# Rows decoded at once, by device: the cache of soft prompts and short answers is small.
BATCH_ROWS = {"cpu": 16, "cuda": 256}

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
    """The answers that the embeddings of `texts` hold, written greedily by the backbone from the soft prompts alone.

    The query itself is not in its sight; the soft prompts are all it sees. See `decode_soft_prompts`.
    """
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
    """As `decode`, from stored soft prompts.

    All rows are of one length, so none is padded, and a row that has ended is only waited for: its batch does not
    change what a row decodes to, up to rounding.

    Args:
        encoder: whose backbone decodes.
        soft_prompts: float32 `[B, n, d]`.
        max_new_tokens: of an answer at most.
        batch_size: rows decoded at once; None: `BATCH_ROWS` of the device.
        show_progress: show a bar.
    """
    rows = batch_size or rows_at_once(encoder)
    starts = range(0, len(soft_prompts), rows)
    stops = stop_token_ids(encoder.model, encoder.tokenizer)
    config = _greedy(stops, max_new_tokens)
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
    place: str | None = None,
) -> Iterator[Decoder]:
    """A decoder by the backbone that is loaded (`transformers`), or by vLLM, which loads it once more.

    Args:
        engine: which.
        encoder: whose backbone decodes, in its dtype.
        compression_tokens: n of the soft prompts.
        max_new_tokens: of an answer at most.
        place: of the backbone, in place of the recorded folder or hub name.

    Raises:
        EngineError: vLLM is not installed or cannot start.
    """
    if engine == "transformers":
        rows = rows_at_once(encoder)
        log.info("decode: %d rows at once (%s)", rows, encoder.model.device.type)
        yield partial(decode_soft_prompts, encoder, max_new_tokens=max_new_tokens, batch_size=rows)
        return
    pass  # MOVED

    recorded = encoder.config.backbone
    name = place or recorded["name"]
    backbone = BackboneParams(
        name=name,
        revision=recorded.get("revision") if name == recorded["name"] else None,
        dtype=str(encoder.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    with vllm_decoder(backbone, compression_tokens=compression_tokens, max_new_tokens=max_new_tokens) as decoder:
        yield decoder


def rows_at_once(encoder: "Encoder") -> int:
    """`BATCH_ROWS` of the encoder's device."""
    device = encoder.model.device.type
    return BATCH_ROWS.get(device, BATCH_ROWS["cuda"])


def _greedy(stops: list[int], max_new_tokens: int) -> "GenerationConfig":
    """Every value is set: unset ones (a repetition penalty) would come from the backbone's file."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )


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
    kept = [row[:end] for row, end in zip(found, ends, strict=True)]
    return [text.strip() for text in encoder.tokenizer.batch_decode(kept, skip_special_tokens=True)]


# Soft prompts to text by vLLM, for many of them: they go in as prompt embeddings, continuously batched.
#
# vLLM has the backbone of its own beside the one that embeds, in a process of its own on a GPU.

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
    from pipeline.generate.engines.vllm import VllmEngine
    from pipeline.generate.engines.vllm_defaults import token_bytes

    engine = VllmEngine.load(
        EngineSetup(
            backbone,
            max_model_len=compression_tokens + max_new_tokens,
            options={**_OPTIONS, **(options or {})},
            token_bytes=token_bytes(_text_config(backbone), backbone.dtype),
        )
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
