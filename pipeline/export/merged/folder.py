"""The files of a merged checkpoint besides weights and tokenizer: pooling, the linear layer, prompts, a README."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone.loading import DType, Keep
from pipeline.core.files import write_json
from pipeline.core.text import templates
from pipeline.encoder.folder.config import EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

# Names that every version of sentence-transformers knows, and vLLM too.
_MODULES = "sentence_transformers.models"
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")

# The encoder itself cuts the text behind an instruction; a tokenizer reads both as one text.
PROMPT_IS_CUT = (
    "A text that is too long loses its start here, and the prompt in front of it with that: cut such texts before."
)


class MergedLayout(NamedTuple):
    """Sizes of a merged checkpoint: hidden size d of the backbone, width e of an embedding.

    The new tokens have the ids from `first_id` on: thought tokens first, then compression tokens, which are read out.
    `max_tokens` is the longest input, new tokens included; `keep` is the side of a longer one that is kept. `ordered`:
    the first dimensions hold most of an embedding.
    """

    first_id: int
    thought_tokens: int
    compression_tokens: int
    hidden: int
    width: int
    max_tokens: int
    keep: Keep = "start"
    ordered: bool = False

    @property
    def new_ids(self) -> list[int]:
        return list(range(self.first_id, self.first_id + self.thought_tokens + self.compression_tokens))

    @property
    def new_names(self) -> list[str]:
        thoughts = [f"<|thought_{index}|>" for index in range(self.thought_tokens)]
        return thoughts + [f"<|compression_{index}|>" for index in range(self.compression_tokens)]


def write_config(folder: Path, layout: MergedLayout, config: Any) -> None:
    """Add to config.json the RoPE keys that older readers look for, and what lets vLLM cut an embedding."""
    path = folder / "config.json"
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    cut = {"is_matryoshka": True} if layout.ordered else {}
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | old_rope_keys(rope) | cut)


def old_rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `rope_theta`, `rope_scaling` and `rope_local_base_freq` for the `rope_parameters` of a config.

    Models whose local layers have another base have parameters by kind of layer.
    """
    kinds = {name: value for name, value in rope.items() if isinstance(value, Mapping)}
    keys = {}
    if kinds:
        keys = old_rope_keys(kinds.get("full_attention", next(iter(kinds.values()))))
        if "rope_theta" in kinds.get("sliding_attention", {}):
            keys["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    elif "rope_theta" in rope:
        keys["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            keys["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return keys


def write_modules(
    folder: Path, layout: MergedLayout, weight: "Tensor", bias: "Tensor", prompts: Mapping[str, str], dtype: DType
) -> None:
    """Write the modules of sentence-transformers, which vLLM reads too; the linear layer has `[e, d]` and `[e]`."""
    weights = ["WordWeights"] if layout.compression_tokens > 1 else []
    names = ["Transformer", *weights, "Pooling", "Dense"]
    paths = {name: f"{index}_{name}" if index else "" for index, name in enumerate(names)}
    modules = [
        {"idx": index, "name": str(index), "path": paths[name], "type": f"{_MODULES}.{name}"}
        for index, name in enumerate(names)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", _sentence_bert_config(layout, dtype))
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    if "WordWeights" in paths:
        write_json(folder / paths["WordWeights"] / "config.json", _token_weights(layout))
    write_json(folder / paths["Pooling"] / "config.json", _pooling(layout))
    _write_dense(folder / paths["Dense"], layout, weight, bias)


def _sentence_bert_config(layout: MergedLayout, dtype: DType) -> dict[str, Any]:
    config: dict[str, Any] = {"max_seq_length": layout.max_tokens, "do_lower_case": False}
    return {**config, "model_args": {"dtype": "float32"}} if _computes_in_float32(layout, dtype) else config


def _computes_in_float32(layout: MergedLayout, dtype: DType) -> bool:
    """Whether sentence-transformers must compute in float32 with weights stored in half precision.

    `WordWeights` returns float32, which a linear layer in half precision would not accept.
    """
    return layout.compression_tokens > 1 and dtype != "float32"


def _token_weights(layout: MergedLayout) -> dict[str, Any]:
    """Weight 1 for the compression tokens and 0 for all others: the mean over a text is the mean over them."""
    compression_ids = layout.new_ids[layout.thought_tokens :]
    return {
        "vocab": [str(token) for token in range(compression_ids[-1] + 1)],
        "word_weights": {str(token): 1.0 for token in compression_ids},
        "unknown_word_weight": 0.0,
    }


def _pooling(layout: MergedLayout) -> dict[str, Any]:
    mode = "lasttoken" if layout.compression_tokens == 1 else "mean_tokens"
    modes = {f"pooling_mode_{name}": name == mode for name in _POOLING_MODES}
    return {"word_embedding_dimension": layout.hidden, **modes, "include_prompt": True}


def _write_dense(folder: Path, layout: MergedLayout, weight: "Tensor", bias: "Tensor") -> None:
    from safetensors.torch import save_file

    config = {
        "in_features": layout.hidden,
        "out_features": layout.width,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(folder / "config.json", config)
    tensors = {"linear.weight": weight.cpu().contiguous(), "linear.bias": bias.cpu().contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_readme(
    folder: Path,
    layout: MergedLayout,
    config: EncoderConfig,
    dtype: DType,
    identity: Mapping[str, Any],
    prompts: Mapping[str, str],
    *,
    own_code: bool,
) -> None:
    """Describe the folder, its use, and where its embeddings differ from the encoder's; `own_code`: the backbone's."""
    text = (
        templates(Path(__file__).parent, autoescape=False)
        .get_template("readme.md.j2")
        .render(
            layout=layout,
            config=config,
            dtype=dtype,
            computes_in_float32=_computes_in_float32(layout, dtype),
            sha256=identity.get("sha256", "unknown"),
            prompts={"query": "", **prompts},
            prompt_is_cut=PROMPT_IS_CUT,
            own_code=own_code,
        )
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
