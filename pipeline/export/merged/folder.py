"""What lies in a merged checkpoint beside weights and tokenizer: pooling, the linear layer, prompts, a README."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone.loading import DType, Keep
from pipeline.core.artifacts import write_json
from pipeline.encoder.folder.config import EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

# Names that every version of sentence-transformers knows, and vLLM too.
_MODULES = "sentence_transformers.models"
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


class Shape(NamedTuple):
    """Sizes of a merged checkpoint.

    Attributes:
        first_id: id of the first new token.
        thought_tokens: how many new tokens are not read out; they come first.
        compression_tokens: n, how many are.
        hidden: d, the width of the backbone.
        width: e, the width of an embedding.
        max_tokens: longest input, new tokens included.
        keep: which side of a longer one is kept.
    """

    first_id: int
    thought_tokens: int
    compression_tokens: int
    hidden: int
    width: int
    max_tokens: int
    keep: Keep = "start"

    @property
    def new_ids(self) -> list[int]:
        """Ids of the new tokens in their order."""
        return list(range(self.first_id, self.first_id + self.thought_tokens + self.compression_tokens))

    @property
    def new_names(self) -> list[str]:
        """What to call the new tokens, in their order."""
        thoughts = [f"<|thought_{index}|>" for index in range(self.thought_tokens)]
        return thoughts + [f"<|compression_{index}|>" for index in range(self.compression_tokens)]


def write_config(folder: Path, config: Any) -> None:
    """Say in config.json once more, where older readers look for it, how positions are rotated."""
    path = folder / "config.json"
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | old_rope_keys(rope))


def old_rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` where there is one, of the `rope_parameters` of a config.

    Models that rotate local layers by another base have parameters by kind of layer.
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
    folder: Path, shape: Shape, weight: "Tensor", bias: "Tensor", prompts: Mapping[str, str], dtype: DType
) -> None:
    """Write the modules of sentence-transformers, which vLLM reads too.

    Args:
        folder: of the checkpoint.
        shape: of the checkpoint.
        weight: of the linear layer, `[e, d]`.
        bias: of the linear layer, `[e]`.
        prompts: what is put before a text, by name.
        dtype: of the written weights.
    """
    names = ["Transformer", "Pooling", "Dense"] if shape.compression_tokens == 1 else [
        "Transformer", "WordWeights", "Pooling", "Dense",
    ]  # fmt: skip
    paths = {name: f"{index}_{name}" if index else "" for index, name in enumerate(names)}
    modules = [
        {"idx": index, "name": str(index), "path": paths[name], "type": f"{_MODULES}.{name}"}
        for index, name in enumerate(names)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", _reading(shape, dtype))
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    if "WordWeights" in paths:
        write_json(folder / paths["WordWeights"] / "config.json", _token_weights(shape))
    write_json(folder / paths["Pooling"] / "config.json", _pooling(shape))
    _write_dense(folder / paths["Dense"], shape, weight, bias)


def _reading(shape: Shape, dtype: DType) -> dict[str, Any]:
    config: dict[str, Any] = {"max_seq_length": shape.max_tokens, "do_lower_case": False}
    return {**config, "model_args": {"dtype": "float32"}} if _widened(shape, dtype) else config


def _widened(shape: Shape, dtype: DType) -> bool:
    """Whether sentence-transformers computes in float32 with weights that are stored in half precision.

    `WordWeights` makes float32 of any precision, which a linear layer in half precision would not take.
    """
    return shape.compression_tokens > 1 and dtype != "float32"


def _token_weights(shape: Shape) -> dict[str, Any]:
    """Weight 1 for the compression tokens and 0 for all else, so that the mean over a text is theirs."""
    read = shape.new_ids[shape.thought_tokens :]
    return {
        "vocab": [str(token) for token in range(read[-1] + 1)],
        "word_weights": {str(token): 1.0 for token in read},
        "unknown_word_weight": 0.0,
    }


def _pooling(shape: Shape) -> dict[str, Any]:
    mode = "lasttoken" if shape.compression_tokens == 1 else "mean_tokens"
    modes = {f"pooling_mode_{name}": name == mode for name in _POOLING_MODES}
    return {"word_embedding_dimension": shape.hidden, **modes, "include_prompt": True}


def _write_dense(folder: Path, shape: Shape, weight: "Tensor", bias: "Tensor") -> None:
    from safetensors.torch import save_file

    config = {
        "in_features": shape.hidden,
        "out_features": shape.width,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(folder / "config.json", config)
    tensors = {"linear.weight": weight.cpu().contiguous(), "linear.bias": bias.cpu().contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# The encoder itself cuts the text behind an instruction; a tokenizer sees both as one.
PROMPT_IS_CUT = (
    "A text that is too long loses its start here, and the prompt in front of it with that: cut such texts before."
)

_README = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, embeddings, llm2vec-gen]
---
# Encoder of {backbone}, merged

An embedding of this model encodes what `{backbone}` would answer to the input (LLM2Vec-Gen).
This folder is for embedding: the tokenizer puts {frame}{new} new tokens (ids {first} to {last}) behind each text,
so that a text for generation would end with them too.
{adapted}
Weights are {dtype}{in_float32}; embeddings have {width} dimensions, are not normalised, and are compared by cosine.
Made from the encoder with sha256 `{sha256}`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")  # no trust_remote_code
queries = model.encode(["Why is the sky blue?"]{prompt})
```

{vllm}
Inputs are {max_tokens} tokens at most, the {new} new ones included; of a longer text the {lost} is cut, never those
(vLLM: `tokenization_kwargs={{"truncate_prompt_tokens": -1}}`, without `truncation_side`, which cuts them).
Texts are expected without white space at their ends. A text that is cut may differ from the encoder's own in its
{last_left} tokens, for that one cuts characters and reads them again{empty}.
{prompt_cut}"""

_VLLM_ONE = """\
```python
from vllm import LLM

llm = LLM("this folder", runner="pooling", dtype="float32")
vectors = [output.outputs.embedding for output in llm.embed(["Why is the sky blue?"])]
```
"""

_VLLM_MANY = """\
vLLM pools one token or all of them; take the mean of the last {n} yourself (`embed` would give another embedding):

```python
from vllm import LLM
from vllm.config import PoolerConfig

pooler = PoolerConfig(task="token_embed", use_activation=False)
llm = LLM("this folder", runner="pooling", dtype="float32", pooler_config=pooler)
outputs = llm.encode(["Why is the sky blue?"], pooling_task="token_embed")
vectors = [output.outputs.data[-{n}:].mean(dim=0) for output in outputs]
```
"""


def write_readme(
    folder: Path,
    shape: Shape,
    config: EncoderConfig,
    dtype: DType,
    identity: Mapping[str, Any],
    prompts: Mapping[str, str],
) -> None:
    """Write what the folder is, how it is used, and where it differs from the encoder that it was made from."""
    vllm = _VLLM_ONE if shape.compression_tokens == 1 else _VLLM_MANY.format(n=shape.compression_tokens)
    frozen = "The language model's own weights are unchanged; generate with the model that it was made from."
    text = _README.format(
        backbone=config.backbone["name"],
        frame="the chat template around and " if config.template == "chat" else "",
        new=len(shape.new_ids),
        first=shape.new_ids[0],
        last=shape.new_ids[-1],
        adapted=frozen if config.lora is None else "LoRA adapters are merged into the weights: this is another model.",
        dtype=dtype,
        in_float32=", sentence-transformers computes with them in float32" if _widened(shape, dtype) else "",
        width=shape.width,
        sha256=identity.get("sha256", "unknown"),
        prompt=', prompt_name="query"' if prompts.get("query") else "",
        vllm=vllm,
        max_tokens=shape.max_tokens,
        lost="end" if shape.keep == "start" else "start",
        last_left="last" if shape.keep == "start" else "first",
        prompt_cut="" if shape.keep == "start" else f"{PROMPT_IS_CUT}\n",
        empty="" if config.template == "chat" else "; of an empty text it reads an end-of-sequence token",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
