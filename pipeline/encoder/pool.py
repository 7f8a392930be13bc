"""Several encoders, one process and one GPU each, behind the interface of one; also on a Ray cluster."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.device import best_device
from pipeline.core.errors import EvaluationError
from pipeline.core.run import progress
from pipeline.parallel.devices import Places
from pipeline.parallel.text_pool import TextPool

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Embedded, Encoder

log = logging.getLogger(__name__)

# Large enough for full batches of like lengths, small enough that the processes end together.
JOB_TEXTS = 512
_FACTS = attrgetter("width", "max_tokens", "identity", "config", "parameter_count")


class ParallelEncoder:
    """An encoder in each place; it has the attributes of `Encoder` that are given here, and only embeds."""

    def __init__(self, load: "Callable[[], Encoder]", places: Places) -> None:
        """Start a process in each place, which calls `load` (picklable); see `TextPool`.

        Raises:
            PipelineError: the error of loading an encoder, or EvaluationError if its process died.
        """
        self._pool = TextPool(load, _FACTS, places, job_texts=JOB_TEXTS, kind="encoder process", error=EvaluationError)
        self.width, self.max_tokens, self.identity, self.config, self.parameter_count = self._pool.facts

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """See `Encoder.encode`; `batch_tokens` holds for each process."""
        found = self.embed(texts, instruction=instruction, batch_tokens=batch_tokens, show_progress=show_progress)
        self.config.warn_of_truncated(found.truncated, len(texts))
        return found.vectors

    def embed(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> "Embedded":
        import numpy as np

        from pipeline.encoder.inference import Embedded, check_texts

        check_texts(texts)  # here, since a process knows only the rows of its job
        vectors = np.empty((len(texts), self.width), np.float32)
        truncated = 0
        nothing: list[str] = []
        with progress(nothing, total=len(texts), desc="encode", unit="text") if show_progress else nullcontext() as bar:
            for chosen, value in self._pool.run("embed", texts, instruction=instruction, batch_tokens=batch_tokens):
                vectors[chosen] = value.vectors
                truncated += value.truncated
                if bar is not None:
                    bar.update(len(chosen))
        return Embedded(vectors, truncated)

    def close(self) -> None:
        self._pool.close()


Variant = Callable[[Any], Any]  # makes of an encoder one of the same backbone; picklable


def trained(encoder: "Encoder") -> "Encoder":
    """The `Variant` that is the encoder itself."""
    return encoder


def encoder_loader(
    path: Path, *, variant: Variant = trained, device: str | None = None, **options: Any
) -> "Callable[[], Encoder]":
    """Loads the encoder of a folder, or a variant of it; picklable.

    `device` None is the best of the process that loads it; options are those of `read_encoder`.
    """
    return partial(_load, path, variant, device, options)


def _load(path: Path, variant: Variant, device: str | None, options: dict[str, Any]) -> "Encoder":
    from pipeline.encoder.folder.read import read_encoder

    encoder: Encoder = variant(read_encoder(path, device=device or best_device(), **options))
    return encoder
