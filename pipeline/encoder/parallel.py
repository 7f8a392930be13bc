"""Several encoders, one process and one GPU each, behind the interface of one."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone import DType, best_device
from pipeline.encoder.config import EncoderConfig
from pipeline.errors import EvaluationError
from pipeline.jobs import TextJobs
from pipeline.places import Place

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Encoder

# Large enough for full batches of like lengths, small enough that the processes end together.
JOB_TEXTS = 512


class Ready(NamedTuple):
    """What a process says of its encoder."""

    width: int
    max_tokens: int
    identity: dict[str, Any]
    config: EncoderConfig


class ParallelEncoder:
    """An encoder in each place; it embeds, and does nothing else that `Encoder` does.

    Attributes:
        width: see `Encoder`.
        max_tokens: see `Encoder`.
        identity: see `Encoder`.
        config: of the encoder.
    """

    def __init__(self, load: "Callable[[], Encoder]", where: Sequence[Place]) -> None:
        """Start the processes and wait until all encoders are loaded.

        Args:
            load: loads an encoder (picklable); runs in each process.
            where: a place for each.

        Raises:
            PipelineError: what was raised when an encoder was loaded, or EvaluationError if its process died.
        """
        self._jobs = TextJobs(load, _ready, where, job_texts=JOB_TEXTS, kind="encoder process", error=EvaluationError)
        self.width, self.max_tokens, self.identity, self.config = self._jobs.facts

    def encode(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None
    ) -> "np.ndarray[Any, Any]":
        """See `Encoder.encode`; the limit is that of each process."""
        import numpy as np

        vectors = np.empty((len(texts), self.width), np.float32)
        for chosen, value in self._jobs.run("encode", texts, instruction=instruction, batch_tokens=batch_tokens):
            vectors[chosen] = value
        return vectors

    def close(self) -> None:
        """Stop the processes."""
        self._jobs.close()


def encoder_loader(
    path: Path, *, dtype: DType, untrained_seed: int | None = None, trust_remote_code: bool = False
) -> "Callable[[], Encoder]":
    """Loads the encoder of a folder onto the best device of the process that calls it; picklable.

    Args:
        path: the folder.
        dtype: of the backbone.
        untrained_seed: of `Encoder.untrained`; None: the trained one.
        trust_remote_code: see `Encoder.load`.
    """
    return partial(_load, path, dtype, untrained_seed, trust_remote_code)


def _load(path: Path, dtype: DType, untrained_seed: int | None, trust_remote_code: bool) -> "Encoder":
    from pipeline.encoder.inference import Encoder

    encoder = Encoder.load(path, device=best_device(), dtype=dtype, trust_remote_code=trust_remote_code)
    return encoder if untrained_seed is None else encoder.untrained(untrained_seed)


def _ready(encoder: "Encoder") -> Ready:
    return Ready(encoder.width, encoder.max_tokens, encoder.identity, encoder.config)
