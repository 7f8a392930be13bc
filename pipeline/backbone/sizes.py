"""Sizes of a decoder-only transformer, from its config: inputs of estimates of memory and time."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.core.config import Params

# Architectures that differ from two norms a layer over the hidden states: (norms a layer, norms of queries and keys).
_NORMS = {
    "gemma2": (4, False),
    "gemma3": (4, True),
    "gemma3_text": (4, True),
    "olmo2": (2, True),
    "olmo3": (2, True),
    "qwen3": (2, True),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class ModelSizes(Params):
    """Sizes of a decoder-only transformer with a gated feed-forward network."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    bias: bool = False
    norms: int = 2
    head_norms: bool = False

    @property
    def queries(self) -> int:
        """Width of all queries of a token, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token; the values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def standard_norms(self) -> bool:
        """Whether norms multiply by their weight; Gemma's multiply by one more than it, and have no fused kernel."""
        return self.norms == 2

    def layer_parameters(self) -> int:
        """Weights of one layer's linear maps (norms left out)."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        biases = self.queries + 2 * self.keys if self.bias else 0
        return attention + biases + 3 * self.hidden * self.intermediate

    def embedding_parameters(self) -> int:
        """Weights of the input embeddings and, where it has its own, of the output head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def parameters(self) -> int:
        """Weights of the model (norms left out)."""
        return self.embedding_parameters() + self.layers * self.layer_parameters()


def sizes_from_config(config: Mapping[str, Any]) -> ModelSizes | None:
    """The sizes in a config.json; None if it names them differently, or for a mixture of experts.

    Layers that differ from each other (Gemma 3n) have a list of sizes, or null, where others have a number.
    """
    config = config.get("text_config") or config
    if any(config.get(key) for key in _EXPERTS):
        return None
    try:
        heads, kind = config["num_attention_heads"], config.get("model_type", "")
        norms, head_norms = _NORMS.get(kind, (2, False))
        return ModelSizes(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", True),
            bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            norms=norms,
            head_norms=head_norms,
        )
    except (KeyError, TypeError, ValidationError):
        return None
