"""Any model that sentence-transformers loads, as a teacher."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.backbone import DType, best_device, identify
from pipeline.errors import BackboneError, TeacherError

if TYPE_CHECKING:
    import numpy as np

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
        """Load the model onto the best device.

        Args:
            name: hub name or local folder.
            revision: commit on the hub.
            max_tokens: longer texts lose their end; never more than the model itself takes.
            dtype: of the weights.
            batch_size: texts of one forward pass.
            prompt: put before each text; "" also switches off a default prompt of the model.
            trust_remote_code: run code that the model ships.

        Raises:
            TeacherError: it cannot be loaded.
        """
        device = best_device()
        log.info("teacher %s: device %s (the best present), %s", name, device, dtype)
        self._model = _load(name, revision, dtype, device, trust_remote_code)
        own = self._model.max_seq_length
        if own is not None and own < max_tokens:
            log.info("teacher %s: %d tokens a text (its own limit, below embed.teacher.max_tokens)", name, own)
        self._model.max_seq_length = min(max_tokens, own or max_tokens)
        self._batch_size, self._prompt = batch_size, prompt
        self.width = int(self._model.get_embedding_dimension())
        self.identity = {
            **_identify(name, revision),
            "kind": "sentence-transformers",
            "version": VERSION,
            "max_tokens": self._model.max_seq_length,
            "dtype": dtype,
            "prompt": prompt,
        }

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        import numpy as np

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


def _identify(name: str, revision: str | None) -> dict[str, Any]:
    try:
        return dict(identify(name, revision))
    except BackboneError as error:
        raise TeacherError(f"embed.teacher.name: {error}") from None


def _load(name: str, revision: str | None, dtype: DType, device: str, trust_remote_code: bool) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    _identify(name, revision)  # a folder that does not exist is said here, before it is taken for a hub name
    try:
        return SentenceTransformer(
            name,
            revision=revision,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(f"embed.teacher.name: cannot load '{name}': {reason}") from None
