"""Any model that sentence-transformers loads, as a teacher."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.device import best_device
from pipeline.backbone.loading import DType, hub_reason, identify, placement, without_weight_bars
from pipeline.core.errors import BackboneError, TeacherError
from pipeline.embed.teachers.pooling import windows
from pipeline.optim.batching import token_batches, token_budget
from pipeline.parallel.prefetch import ahead

log = logging.getLogger(__name__)

VERSION = 1


class SentenceTransformersTeacher:
    """Embeds as `SentenceTransformer.encode`, in batches of tokens; normalised only if the model's modules do so.

    While a batch is read, a thread tokenises the next.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        max_tokens: int,
        dtype: DType,
        batch_tokens: int | None = None,
        prompt: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model onto the best device.

        Raises TeacherError if it cannot be loaded, or `max_tokens` leaves no room for a text.

        Args:
            name: hub name or local folder.
            max_tokens: longer texts lose their end; never more than the model itself takes.
            batch_tokens: most tokens of a forward pass, unless one text alone has more; None: by the device.
            prompt: put before each text; "" also switches off a default prompt of the model.
        """
        device = best_device()
        log.info("teacher %s: device %s (the best present), %s", name, device, dtype)
        self._model = load_model(name, revision, dtype, device, trust_remote_code).eval()
        self.max_tokens = limit_tokens(self._model, name, max_tokens)
        self._batch_tokens, self._prompt = token_budget(batch_tokens, self._model.device.type), prompt
        read_control_tokens_as_text(self._model.tokenizer, prompt)
        if self.max_tokens is not None and (taken := self.token_lengths([""])[0]) >= self.max_tokens:
            message = f"{self.max_tokens} leaves no room for a text: prompt and special tokens take {taken}"
            raise TeacherError(message, argument="max_tokens")
        self.width = int(self._model.get_embedding_dimension())
        self.identity = {
            **identify(name, revision),
            "kind": "sentence-transformers",
            "version": VERSION,
            "max_tokens": self.max_tokens,
            "dtype": dtype,
            "prompt": prompt,
        }

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch
        from sentence_transformers.util import batch_to_device, truncate_embeddings

        vectors = np.empty((len(texts), self.width), np.float32)
        with torch.inference_mode():
            for rows, features in ahead(self._batches(texts)):
                out = self._model(batch_to_device(features, self._model.device))["sentence_embedding"]
                vectors[rows] = truncate_embeddings(out, self._model.truncate_dim).float().cpu().numpy()
        return vectors

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Rows and what the model reads of them."""
        for window in windows(texts, self._batch_tokens):
            whole = np.array(self.token_lengths([texts[row] for row in window]))
            read = whole if self.max_tokens is None else np.minimum(whole, self.max_tokens)
            for batch in token_batches(read, self._batch_tokens, padded=True):
                rows = [window[at] for at in batch]
                yield rows, self._model.preprocess([texts[row] for row in rows], prompt=self._prompt)

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_lengths`; the prompt and the special tokens count."""
        prompted, tokenizer = [self._prompt + text for text in texts], self._model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # static word vectors come with a bare `tokenizers.Tokenizer`
            return [len(row.ids) for row in tokenizer.encode_batch(prompted, add_special_tokens=False)]
        return [len(ids) for ids in tokenizer(prompted, truncation=False, verbose=False)["input_ids"]] if texts else []


def read_control_tokens_as_text(tokenizer: Any, prompt: str) -> None:
    """Have a tokenizer read what texts spell (`[SEP]`, `</s>`) as ordinary characters, unless the prompt needs it."""
    if hasattr(tokenizer, "encode_batch"):  # a bare `tokenizers.Tokenizer`
        tokenizer.encode_special_tokens = True
    elif not ControlTokens(tokenizer).within(prompt):
        tokenizer.split_special_tokens = True


def limit_tokens(model: Any, name: str, max_tokens: int) -> int | None:
    """Set the tokens that the model reads: `max_tokens`, or its own limit where that is lower; None means all."""
    own = model.max_seq_length
    if own == math.inf:
        log.info("%s: reads the whole of every text (static word vectors); max_tokens has no effect", name)
        return None
    if own is not None and own < max_tokens:
        log.info("%s: %d tokens a text (its own limit, below max_tokens)", name, own)
    model.max_seq_length = min(max_tokens, own or max_tokens)
    return int(model.max_seq_length)


def load_model(name: str, revision: str | None, dtype: DType, device: str, trust_remote_code: bool) -> Any:
    """The SentenceTransformer. Raises TeacherError if it cannot be loaded."""
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        identify(name, revision)  # refuses a missing folder, which would be taken for a name on the hub
        with without_weight_bars():
            return SentenceTransformer(
                name,
                revision=revision,
                device=device,
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": getattr(torch, dtype), **placement(device)},
            )
    except BackboneError as error:
        raise TeacherError(error.message, argument="name") from None
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise TeacherError(f"cannot load '{name}': {hub_reason(error, name)}", argument="name") from None
