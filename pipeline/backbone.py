"""The frozen language model and its tokenizer: identity, loading, and the one way a text becomes prompt tokens."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.artifacts import digest_of, file_sha256
from pipeline.errors import BackboneError
from pipeline.params import Params

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Template = Literal["raw", "chat"]
DType = Literal["bfloat16", "float16", "float32"]
Quantize = Literal["8bit", "4bit"]
DTYPE_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
Keep = Literal["start", "end"]

# All that decides what a model folder computes: weights, configs, tokenizer, modules, its own code.
_IDENTITY_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")


class BackboneParams(Params):
    """The language model whose answers are encoded."""

    name: str = Field(description="hub name or local folder")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    dtype: DType = "bfloat16"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="e.g. {enable_thinking: false}")
    trust_remote_code: bool = False


def identify(name: str, revision: str | None) -> dict[str, str]:
    """What pins a model: hub name and commit, or the sha256 over a local folder's weights and tokenizer.

    Raises:
        BackboneError: a local path that is not a folder with a config.json or modules.json.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name):
            raise BackboneError(f"model folder {name} does not exist")
        return {"name": name, "revision": revision or "main"}
    files = sorted({path for pattern in _IDENTITY_FILES for path in folder.rglob(pattern)})
    if not files:
        raise BackboneError(f"{name} is a folder without model weights")
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    return {"name": name, "sha256": digest_of(hashes)}


def load_tokenizer(params: BackboneParams) -> "PreTrainedTokenizerBase":
    """The backbone's tokenizer.

    Raises:
        BackboneError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            params.name, revision=params.revision, trust_remote_code=params.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(params, error) from None


def load_config(backbone: BackboneParams) -> Any:
    """The backbone's text config.

    Raises:
        BackboneError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            backbone.name, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(backbone, error) from None
    return config.get_text_config()


def load_backbone(
    params: BackboneParams, device: "torch.device | str" = "cpu", quantize: Quantize | None = None
) -> "PreTrainedModel":
    """The causal LM in eval mode with every parameter frozen.

    Quantised, its linear layers hold 8-bit integers (LLM.int8) or 4-bit normal floats in blocks (NF4, the scales
    quantised again); embeddings, norms and the output head stay in `params.dtype`, in which 4-bit layers compute.

    Raises:
        BackboneError: it cannot be loaded, or not quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # bitsandbytes packs the weights where they come to lie, so a quantised model is not moved afterwards.
    options = {} if quantize is None else _quantized(quantize, params, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            params.name,
            revision=params.revision,
            dtype=getattr(torch, params.dtype),
            trust_remote_code=params.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        raise _cannot_load(params, error) from None
    model = _differentiable(model) if options else model.to(device)
    return model.eval().requires_grad_(False)


def _quantized(quantize: Quantize, params: BackboneParams, device: "torch.device | str") -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"train.quantize: {quantize} needs bitsandbytes, which is not installed: "
            "pip install 'llm2vec-gen-pipeline[quantize]', or set train.quantize: null"
        )
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, params.dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _differentiable(model: "PreTrainedModel") -> "PreTrainedModel":
    # On a CPU with bfloat16 instructions a 4-bit layer repacks itself at its first forward without autograd (the prefix
    # of a query), and from then on it lets no gradient through, without an error.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _cannot_load(params: BackboneParams, error: Exception) -> BackboneError:
    revision = f" at revision {params.revision}" if params.revision else ""
    reason = str(error).strip().splitlines()[0]
    return BackboneError(f"backbone.name: cannot load '{params.name}'{revision}: {reason}")


def best_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class FormattedPrompt:
    """Token ids of a prompt, whether its text was cut to fit, and what is left of the text."""

    token_ids: list[int]
    truncated: bool
    text: str


class PromptFormatter:
    """Turns a text into the backbone's prompt tokens, at most `max_tokens` of them.

    `raw` is the text itself with the tokenizer's own special tokens (as the paper trains); `chat` is the chat
    template with the text as the user's turn and the start of the assistant's. Of a text that is too long the start or
    the end is kept; the template around it stays whole.

    Attributes:
        keep: which side of a text that is too long is kept.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        max_tokens: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep: Keep = "start",
    ) -> None:
        """Raises BackboneError if the tokenizer has no chat template, or the template alone exceeds `max_tokens`."""
        self._tokenizer, self._template, self._max_tokens = tokenizer, template, max_tokens
        self._kwargs, self.keep = chat_template_kwargs or {}, keep
        if template == "chat" and not tokenizer.chat_template:
            raise BackboneError(
                f"tokenizer of '{tokenizer.name_or_path}' has no chat template: use an instruct model, "
                "or for the student set train.template: raw"
            )
        self._overhead = len(self._ids([""])[0])
        if self._overhead >= max_tokens:
            raise BackboneError(
                f"the {template} template alone takes {self._overhead} tokens, the limit is {max_tokens}: raise it"
            )

    def __call__(self, text: str) -> FormattedPrompt:
        """The prompt of one text."""
        return self.batch([text])[0]

    @property
    def opens_thinking(self) -> bool:
        """Whether the prompt itself opens the `<think>` block that the answer goes on in."""
        return self._template == "chat" and self._render("").rstrip().endswith("<think>")

    def batch(self, texts: Sequence[str], prefix: str = "") -> list[FormattedPrompt]:
        """The prompts of several texts, tokenised together, each with `prefix` in front.

        A text that loses its start loses none of `prefix`.

        Raises:
            BackboneError: that leaves such a text no room.
        """
        if not texts:
            return []
        # Four characters a token is already long; beyond this bound tokenising the rest is wasted work.
        limit = 64 * self._max_tokens
        wholes = [prefix + text for text in texts]
        if self.keep == "start":
            bounded = [whole[:limit] for whole in wholes]
        else:
            bounded = [prefix + text[-limit:] for text in texts]
        return [
            FormattedPrompt(ids, len(left) < len(whole), left)
            if len(ids) <= self._max_tokens
            else self._cut(left, prefix)
            for whole, left, ids in zip(wholes, bounded, self._ids(bounded), strict=True)
        ]

    def _cut(self, text: str, prefix: str) -> FormattedPrompt:
        return self._cut_end(text) if self.keep == "start" else self._cut_start(text[len(prefix) :], prefix)

    def _cut_start(self, text: str, prefix: str) -> FormattedPrompt:
        taken = len(self._ids([prefix])[0])
        if taken >= self._max_tokens:
            raise BackboneError(
                f"the instruction {prefix!r} takes {taken} tokens, template included, the limit is {self._max_tokens}, "
                "and of a text the end is kept: nothing is left for it; shorten the instruction or raise the limit"
            )
        offsets = self._offsets(text)
        return self._fitted(
            min(self._max_tokens - taken, len(offsets)), lambda count: prefix + text[offsets[-count][0] :], prefix
        )

    def _cut_end(self, text: str) -> FormattedPrompt:
        offsets = self._offsets(text)
        return self._fitted(
            min(self._max_tokens - self._overhead, len(offsets)), lambda count: text[: offsets[count - 1][1]], ""
        )

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding["offset_mapping"])

    def _fitted(self, count: int, left: Callable[[int], str], nothing: str) -> FormattedPrompt:
        """What is `left` of a text with `count` of its tokens, or as few less as fit; `nothing` if none does."""
        while count > 0:
            kept = left(count)
            (ids,) = self._ids([kept])
            if len(ids) <= self._max_tokens:
                return FormattedPrompt(ids, True, kept)
            count -= len(ids) - self._max_tokens
        return FormattedPrompt(self._ids([nothing])[0], True, nothing)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._template == "raw":
            return list(self._tokenizer(list(texts), verbose=False)["input_ids"])
        rendered = [self._render(text) for text in texts]
        return list(self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, text: str) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **self._kwargs
            )
        )


def eos_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The end-of-sequence token that the tokenizer names.

    Raises:
        BackboneError: it names none.
    """
    if tokenizer.eos_token_id is None:
        raise BackboneError(f"tokenizer of '{tokenizer.name_or_path}' names no EOS token")
    return int(tokenizer.eos_token_id)


def pad_left(rows: Sequence[Sequence[int]], fill: int = 0) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rows of token ids as `(input_ids, attention_mask)`, both int64 [B, T], padded on the left.

    Needs no pad token: padded positions are masked, whatever their id.
    """
    return _pad(rows, fill, left=True)


def pad_right(rows: Sequence[Sequence[int]], fill: int = 0) -> "tuple[torch.Tensor, torch.Tensor]":
    """As `pad_left`, on the right."""
    return _pad(rows, fill, left=False)


def _pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    return ids, mask
