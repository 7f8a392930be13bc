"""A system behind mteb's encoder protocol: texts get the instruction of their task and side, cosine compares."""

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.files import digest_of
from pipeline.evaluate.system import BARE, System, encode_finite, innermost, revision_of
from pipeline.tasks.instructions import Instructions, Side

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

ORGANISATION = "llm2vec-gen"
LOCAL = "local"

_FRAMEWORKS = {"sentence-transformers": ["Sentence Transformers", "PyTorch"]}


class MtebEncoder:
    """The model that `mteb.evaluate` runs, named `llm2vec-gen/<system>`; results are published by `published_meta`.

    Its revision changes with all that a score depends on besides the task, so the result cache never returns scores of
    other weights, instructions or precision.
    """

    def __init__(self, system: System, instructions: Instructions, *, dtype: str) -> None:
        """`dtype` is the precision of the system's forward passes."""
        self.system = system
        self._instructions = instructions
        self.mteb_model_meta = _meta(
            name=f"{ORGANISATION}/{system.name}",
            revision=revision_of(system, instructions=instructions.digest, dtype=dtype),
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
        where = f"task '{task_metadata.name}', split '{hf_split}'"
        return encode_finite(self.system, texts, instruction, side, where=where)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each of [N, d] with each of [M, d], [N, M]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of row i of [N, d] with row i of [N, d], [N]."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def published_meta(system: System, model_name: str | None = None) -> Any:
    """mteb's ModelMeta under which a system's results can be submitted; unknown fields stay None.

    The student is named `model_name` or `llm2vec-gen/<backbone>-llm2vec-gen`; a system made of the backbone, or of a
    hub model with adapters or a transform, `llm2vec-gen/<backbone>-<system>`; other hub models as on the hub; a local
    folder `local/<folder>`. The revision is the hub commit, the start of the weights' sha256, or a hash over several.
    """
    identity = system.identity
    backbone = _backbone(identity)
    config = identity.get("config", {})
    inner = innermost(system)
    embedder = getattr(inner, "encoder", None) or getattr(inner, "teacher", None)
    return _meta(
        name=_published_name(system, model_name),
        revision=_published_revision(identity),
        n_parameters=getattr(getattr(inner, "encoder", None), "parameter_count", None),
        embed_dim=getattr(embedder, "width", None) or config.get("width"),
        max_tokens=config.get("max_query_tokens") or identity.get("max_tokens"),
        framework=_FRAMEWORKS.get(str(identity.get("kind")), ["PyTorch", "Transformers"] if backbone else []),
        use_instructions=system.prompting != BARE,
        adapted_from=_adapted_from(identity),
    )


def _meta(**known: Any) -> Any:
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    return ModelMeta.create_empty(overwrites={"similarity_fn_name": ScoringFunction.COSINE, **known})


def _backbone(identity: dict[str, Any]) -> dict[str, Any]:
    """The backbone behind a system; empty for one that is a model of its own."""
    found = identity.get("config", {}).get("backbone") or identity.get("backbone") or {}
    return found if "name" in found else {}


def _adapted_from(identity: dict[str, Any]) -> str | None:
    """The model of the hub, or the folder, that a system adapts; None if it is that model itself."""
    backbone = _backbone(identity)
    if "revision" in backbone:
        return str(backbone["name"])
    return str(identity["name"]) if _is_part(identity) else None


def _published_name(system: System, model_name: str | None) -> str:
    identity, backbone = system.identity, _backbone(system.identity)
    if system.name == "student" and model_name is not None:
        return model_name
    if backbone:
        suffix = "llm2vec-gen" if system.name == "student" else system.name
        return f"{ORGANISATION}/{PurePath(backbone['name']).name}-{suffix}"
    name = str(identity.get("name", ""))
    if not name:
        return f"{ORGANISATION}/{system.name}"
    if _is_part(identity):
        return f"{ORGANISATION}/{PurePath(name).name}-{system.name}"
    return name if "sha256" not in identity and name.count("/") == 1 else f"{LOCAL}/{PurePath(name).name}"


def _published_revision(identity: dict[str, Any]) -> str:
    weights = None if _is_part(identity) else identity.get("sha256") or identity.get("revision")
    return str(weights or digest_of(identity))[:40]


def _is_part(identity: dict[str, Any]) -> bool:
    """Whether the model that an identity names is only a part of what embeds."""
    return bool(identity.get("adapters") or identity.get("transform") or identity.get("kind") == "backbone")
