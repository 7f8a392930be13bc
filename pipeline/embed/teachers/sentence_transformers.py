"""Any model that sentence-transformers loads, as a teacher."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import DType, hub_reason, identify, placement
from pipeline.core.errors import BackboneError, TeacherError

log = logging.getLogger(__name__)

VERSION = 1


class SentenceTransformersTeacher:
    """Embeds with `SentenceTransformer.encode`, which sorts by length; normalised only if the model's modules do so."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        max_tokens: int,
        dtype: DType,
        batch_size: int,
        prompt: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model onto the best device; raises TeacherError if it cannot be loaded.

        Args:
            name: hub name or local folder.
            max_tokens: longer texts lose their end; never more than the model itself takes.
            prompt: put before each text; "" also switches off a default prompt of the model.
        """
        device = best_device()
        log.info("teacher %s: device %s (the best present), %s", name, device, dtype)
        self._model = load_model(name, revision, dtype, device, trust_remote_code)
        self.max_tokens = limit_tokens(self._model, name, max_tokens)
        self._batch_size, self._prompt = batch_size, prompt
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

        if not texts:
            return np.zeros((0, self.width), np.float32)
        vectors = self._model.encode(
            list(texts),
            batch_size=self._batch_size,
            prompt=self._prompt,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.asarray(vectors, dtype=np.float32)

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_lengths`; the prompt and the special tokens count."""
        prompted, tokenizer = [self._prompt + text for text in texts], self._model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # static word vectors come with a bare `tokenizers.Tokenizer`
            return [len(row.ids) for row in tokenizer.encode_batch(prompted, add_special_tokens=False)]
        return [len(ids) for ids in tokenizer(prompted, truncation=False, verbose=False)["input_ids"]] if texts else []


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
    from sentence_transformers import SentenceTransformer

    try:
        identify(name, revision)  # refuses a missing folder, which would be taken for a name on the hub
        return SentenceTransformer(
            name,
            revision=revision,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": getattr(torch, dtype), **placement(device)},
        )
    except BackboneError as error:
        raise TeacherError(error.message, argument="name") from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TeacherError(f"cannot load '{name}': {hub_reason(error, name)}", argument="name") from None
