"""The fallback engine: `generate` of transformers in length-sorted batches. Runs wherever the backbone loads."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
from pipeline.backbone.prompting import pad_left
from pipeline.core.config import Params
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.checks import describe, too_long

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 1
SPEED_OPTIONS = frozenset({"batch_size"})

BATCH_SIZE = 16
# Prompts are sorted by length within this many batches: little padding, and still a stream.
WINDOW_BATCHES = 16


class TransformersOptions(Params):
    """`generate.options` of this engine."""

    batch_size: int = Field(default=BATCH_SIZE, ge=1, description="prompts of one batch")


class TransformersEngine:
    """Completes prompts in batches, left-padded under a mask, so no pad token is needed."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_model_len: int,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """`max_model_len` bounds prompt and answer together; `batch_size` is in prompts."""
        self._model, self._tokenizer = model, tokenizer
        self._max_model_len, self._batch_size = max_model_len, batch_size
        self._stops = stop_token_ids(model, tokenizer)

    @classmethod
    def load(
        cls, backbone: BackboneParams, *, max_model_len: int, batch_size: int = BATCH_SIZE
    ) -> "TransformersEngine":
        """Load the backbone onto the best device.

        Raises:
            BackboneError: it cannot be loaded.
        """
        device = best_device()
        log.info("engine transformers: device %s (the best present), %d prompts a batch", device, batch_size)
        tokenizer, model = load_tokenizer(backbone), load_backbone(backbone, device)
        return cls(model, tokenizer, max_model_len=max_model_len, batch_size=batch_size)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`; rows of a batch come together."""
        stream = iter(prompts)
        while window := list(islice(stream, self._batch_size * WINDOW_BATCHES)):
            fitting = []
            for prompt in window:
                reason = too_long(len(prompt.token_ids), sampling.max_new_tokens, self._max_model_len)
                if reason:
                    yield Completion(prompt.id, "", "error", 0, reason)
                else:
                    fitting.append(prompt)
            fitting.sort(key=lambda prompt: len(prompt.token_ids))
            for start in range(0, len(fitting), self._batch_size):
                yield from self._isolated(fitting[start : start + self._batch_size], sampling)

    def close(self) -> None:
        """Drop the model."""
        import torch

        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _isolated(self, batch: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete a batch; when it fails, row by row, so that one bad prompt fails alone."""
        try:
            return self._complete(batch, sampling)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                return [Completion(batch[0].id, "", "error", 0, describe(error))]
        return [completion for prompt in batch for completion in self._isolated([prompt], sampling)]

    def _complete(self, batch: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        import torch

        ids, mask = pad_left([prompt.token_ids for prompt in batch])
        device = self._model.device
        processors = [_RowSampler(sampling, [prompt.seed for prompt in batch])] if sampling.temperature else []
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._config(sampling),
                logits_processor=processors,
            )
        rows = output[:, ids.shape[1] :].tolist()
        return [self._completion(prompt, row, sampling) for prompt, row in zip(batch, rows, strict=True)]

    def _config(self, sampling: Sampling) -> "GenerationConfig":
        """Greedy over what the row sampler leaves. Every value is set: unset ones would come from the model's file."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self._stops,
            pad_token_id=self._stops[0] if self._stops else 0,
        )

    def _completion(self, prompt: Prompt, row: list[int], sampling: Sampling) -> Completion:
        end = next((index for index, token in enumerate(row) if token in self._stops), None)
        kept = row if end is None else row[:end]
        return Completion(
            id=prompt.id,
            text=str(self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            response_tokens=len(kept) if end is None else end + 1,
        )


def stop_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and those of the model's generation config."""
    named = model.generation_config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)


class _RowSampler:
    """A logits processor whose arg max is a sample: Gumbel noise from one generator a row.

    So a row's answer depends on its own seed and not on its batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        import torch
        from transformers import TopPLogitsWarper

        self._temperature = sampling.temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores [B, V] over the temperature, cut to top-p, with noise."""
        import torch

        scores = scores.float() / self._temperature
        if self._top_p:
            scores = self._top_p(input_ids, scores)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self._generators])
        return scores - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))).to(scores.device)
