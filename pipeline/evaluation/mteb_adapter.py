"""A system behind mteb's encoder protocol: each text gets the instruction of its task and side, cosine compares."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.evaluation.instructions import Instructions, Side
from pipeline.evaluation.systems import System, revision_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

ORGANISATION = "llm2vec-gen"


class MtebEncoder:
    """What `mteb.evaluate` takes as a model.

    Its name is `llm2vec-gen/<system>`; its revision changes with all that a score depends on besides the task, so a
    result cache never serves the scores of other weights, instructions or precision.
    """

    def __init__(self, system: System, instructions: Instructions, *, dtype: str) -> None:
        """`dtype` is the precision of the system's forward passes."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        self.system = system
        self._instructions = instructions
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"{ORGANISATION}/{system.name}",
                "revision": revision_of(system, instructions=instructions.digest, dtype=dtype),
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: "DataLoader[Any]",
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """Embeddings float32 [N, d] of a loader's texts (mteb has joined titles to the texts of documents).

        Raises:
            EvaluationError: the task has no instruction, or an embedding is not finite.
        """
        side: Side = "document" if prompt_type is not None and prompt_type.value == "document" else "query"
        instruction = self._instructions.choose(task_metadata.name, task_metadata.type, side)
        texts = [text for batch in inputs for text in batch["text"]]
        embeddings = np.asarray(self.system.encode(texts, instruction), dtype=np.float32)
        _check_finite(embeddings, texts, f"{self.system.name}, task '{task_metadata.name}', split '{hf_split}'")
        return embeddings

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each of [N, d] with each of [M, d], [N, M]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of row i of [N, d] with row i of [N, d], [N]."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _check_finite(embeddings: np.ndarray, texts: list[str], where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"{where}: {len(bad)} of {len(texts)} embeddings are not finite, first: {texts[bad[0]][:80]!r}"
        )
