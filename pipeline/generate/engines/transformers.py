"""`generate` of transformers in length-sorted batches. Runs wherever the backbone loads."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import load_backbone, load_tokenizer
from pipeline.backbone.prompting import pad_left
from pipeline.core.config import Params
from pipeline.core.errors import describe
from pipeline.core.run import is_out_of_memory
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.checks import parse_options, split_fitting, stop_tokens

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCH_SIZE = 16  # prompts
# Prompts are sorted by length within this many batches: little padding, and still a stream.
WINDOW_BATCHES = 16


class TransformersOptions(Params):
    """Options of this engine."""

    batch_size: int = Field(default=BATCH_SIZE, ge=1, description="prompts of one batch")


class TransformersEngine:
    """Completes prompts in batches, left-padded under a mask, so no pad token is needed."""

    VERSION: ClassVar[int] = 1
    SPEED_OPTIONS: ClassVar[frozenset[str]] = frozenset(TransformersOptions.model_fields)

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_model_len: int,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_model_len, self._batch_size = max_model_len, batch_size
        self._stops = stop_token_ids(model, tokenizer)

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        batch_size = parse_options(setup.options, TransformersOptions).batch_size
        device = best_device()
        log.info("engine transformers: device %s (the best present), %d prompts a batch", device, batch_size)
        tokenizer, model = load_tokenizer(setup.backbone), load_backbone(setup.backbone, device)
        return cls(model, tokenizer, max_model_len=setup.max_model_len, batch_size=batch_size)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        stream = iter(prompts)
        while window := list(islice(stream, self._batch_size * WINDOW_BATCHES)):
            fitting, refused = split_fitting(window, sampling.max_new_tokens, self._max_model_len)
            yield from refused
            fitting.sort(key=lambda prompt: len(prompt.token_ids))
            for start in range(0, len(fitting), self._batch_size):
                yield from self._isolated(fitting[start : start + self._batch_size], sampling)

    def close(self) -> None:
        import torch

        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _isolated(self, batch: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete a batch; if it fails, row by row, so that one bad prompt fails alone."""
        try:
            return self._complete(batch, sampling)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            if len(batch) == 1:
                return [Completion.failed(batch[0].id, describe(error))]
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
                generation_config=greedy_config(self._stops, sampling.max_new_tokens),
                logits_processor=processors,
            )
        rows = output[:, ids.shape[1] :].tolist()
        return [self._completion(prompt, row) for prompt, row in zip(batch, rows, strict=True)]

    def _completion(self, prompt: Prompt, row: list[int]) -> Completion:
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
    return stop_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id)


def greedy_config(stops: list[int], max_new_tokens: int) -> "GenerationConfig":
    """Greedy, over a row sampler's scores too. Every value is set: unset ones would come from the model's file."""
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


class _RowSampler:
    """A logits processor whose arg max is a sample: Gumbel noise, one generator a row, so no row sees its batch."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        import torch
        from transformers import TopPLogitsWarper

        self._temperature = sampling.temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores `[B, V]` over the temperature, cut to top-p, plus noise."""
        import torch

        scores = scores.float() / self._temperature
        if self._top_p:
            scores = self._top_p(input_ids, scores)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self._generators])
        return scores - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))).to(scores.device)
