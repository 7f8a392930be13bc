"""An LLM2Vec-Gen encoder as a module of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)`.

This file needs torch, transformers, safetensors and sentence-transformers (and peft for LoRA adapters), nothing else.
A text runs through a frozen language model, followed by trained tokens; two trained projections make the embedding of
their hidden states, or of the text's where it stands twice in its prompt (`pool`). At a `response_share` below 1 the
standardised hidden states stand beside it; with a `rotated_width` all of it is rotated. The language model is loaded by
the name and revision in `encoder_config.json`.

    SentenceTransformer(folder, trust_remote_code=True, model_kwargs={
        "backbone": "/models/llm",         # where the language model is; or LLM2VEC_GEN_BACKBONE in the environment
        "allow_other_backbone": True,      # also if it is not the one that the encoder was trained on
        "dtype": "bfloat16",               # of the language model, float32 by default; other arguments of
    })                                     # transformers' from_pretrained go here too

A recorded folder is checked by the sha256 of its files, a hub model by name and commit, or by the commit in the name of
a folder of the hub's cache. Any other folder is used with a warning. Code that comes with the language model runs only
with `"trust_remote_code": True` among the `model_kwargs`.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers.util import load_dir_path
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

try:
    from sentence_transformers.base.modules import InputModule
except ModuleNotFoundError:
    raise ImportError(
        f"this encoder needs sentence-transformers 5.4 or later, {sentence_transformers.__version__} is installed"
    ) from None

VERSION = 1

CONFIG_FILE = "encoder_config.json"
WEIGHTS_FILE = "student.safetensors"
TRANSFORM_FILE = "transform.safetensors"
READING_FILE = "reading.safetensors"
ROTATION_FILE = "rotation.safetensors"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What a prompt of the template `echo` says of a text.
ECHO = "Rewrite the sentence: {text}, rewritten sentence: {text}"
BACKBONE_VARIABLE = "LLM2VEC_GEN_BACKBONE"

_KEYS = {
    "backbone", "chat_template_kwargs", "template", "max_query_tokens", "compression_tokens", "thought_tokens",
    "hidden", "width",
}  # fmt: skip
_IDENTITY_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
_ELSEWHERE = f"say where it is by model_kwargs={{'backbone': PATH}} or {BACKBONE_VARIABLE}=PATH"

log = logging.getLogger(__name__)


class _InFloat32(nn.Module):
    """Stays in float32 on any device, whatever dtype the language model around it is given."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]


class _Projection(_InFloat32, nn.Linear):
    pass


class Head(_InFloat32):
    """T thought and n compression tokens `[T + n, d]`, and two projections, d -> d and d -> e.

    `share` is that of the predicted response in an embedding. Below 1, `reading` holds the mean and the scale of hidden
    states `[d]`, and `lengths` of predictions and readings `[2]`; the reading stands beside the response or is `added`
    to it. If `reading` has a map, weight `[e, d]` and bias `[e]`, to the space where it is added, or one by which it is
    `decorrelated`, what the map gives is joined, and its length is the third of `lengths`. A `rotation` holds the whole
    map from the mean hidden state to rotated embeddings: weight `[k, d]`, bias `[k]`.
    """

    reading_mean: Tensor
    reading_scale: Tensor
    reading_lengths: Tensor
    reading_weight: Tensor
    reading_bias: Tensor
    rotation_weight: Tensor
    rotation_bias: Tensor

    def __init__(
        self,
        hidden: int,
        width: int,
        tokens: int,
        share: float = 1.0,
        reading: dict[str, Tensor] | None = None,
        rotation: dict[str, Tensor] | None = None,
        added: bool = False,
        decorrelated: bool = False,
    ) -> None:
        super().__init__()
        self.share, self.rotated, self.added = share, bool(rotation), added
        self.mapped = (added or decorrelated) and "weight" in (reading or {})
        for kind, tensors in (("reading", reading), ("rotation", rotation)):
            for name, value in (tensors or {}).items():
                self.register_buffer(f"{kind}_{name}", value.float(), persistent=False)
        self.tokens = nn.Parameter(torch.zeros(tokens, hidden))
        self.reconstruction = _Projection(hidden, hidden)
        self.alignment = _Projection(hidden, width)

    def soft_prompts(self, hidden: Tensor) -> Tensor:
        """Soft prompts `[B, n, d]`, which the language model can decode, of hidden states `[B, n, d]`."""
        weight = self.reconstruction.weight
        return self.reconstruction(hidden.to(weight.device, weight.dtype))

    def embedding(self, soft_prompts: Tensor, hidden: Tensor) -> Tensor:
        """Embeddings `[B, e]`, at a share below 1 `[B, e + d]`, rotated `[B, k]`, of soft prompts and hidden states."""
        if self.rotated:
            weight = self.rotation_weight
            return hidden.to(weight.device, weight.dtype).mean(dim=1) @ weight.T + self.rotation_bias
        predicted = self.alignment(soft_prompts).mean(dim=1)
        if self.share == 1:
            return predicted
        mean, scale, lengths = self.reading_mean, self.reading_scale, self.reading_lengths
        read = (hidden.to(mean.device, mean.dtype).mean(dim=1) - mean) * scale
        if self.mapped:
            read, lengths = read @ self.reading_weight.T + self.reading_bias, lengths[[0, 2]]
        parts = predicted * (self.share * lengths[1] / lengths[0]), read * (1 - self.share)
        return parts[0] + parts[1] if self.added else torch.cat(parts, dim=1)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The content of `reading.safetensors` or `rotation.safetensors`; empty without it."""
        start = f"{kind}_"
        return {name.removeprefix(start): value for name, value in self.named_buffers() if name.startswith(start)}


class LLM2VecGenEncoder(InputModule):  # type: ignore[misc]  # sentence-transformers has no types here
    """Texts in, embeddings and soft prompts out.

    Attributes:
        backbone: the frozen causal language model, with LoRA adapters if there are any.
        max_seq_length: longest prompt in tokens, template included, new tokens not; of longer texts the side named by
            `keep` of `encoder_config.json` is kept.
        truncated: how many texts were truncated so far.
    """

    config_file_name = CONFIG_FILE
    save_in_root = True

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        head: Head,
        encoder_config: dict[str, Any],
        adapter_config: dict[str, Any] | None = None,
        transform: bytes | None = None,
    ) -> None:
        """From loaded parts; `load` reads them.

        `adapter_config` is peft's; `transform` the content of `transform.safetensors`, which `save` writes.
        """
        super().__init__()
        self.backbone, self.tokenizer, self.head = backbone, tokenizer, head
        self.encoder_config, self.adapter_config, self._transform = encoder_config, adapter_config, transform
        self.max_seq_length = encoder_config["max_query_tokens"]
        self.truncated = 0
        self._prompts()  # a limit that the template alone exceeds is an error now, not at the first text

    # --- texts to tokens --------------------------------------------------------------------------------------------

    def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Prompt tokens `[B, T]`, padded on the left, and their mask; ValueError if something is not a text."""
        for text in inputs:
            if not isinstance(text, str):
                found = f"{type(text).__name__}: {str(text)[:80]}"
                # No TypeError: sentence-transformers would try again without the prompt.
                raise ValueError(f"this encoder embeds texts, got a {found}")  # noqa: TRY004
        prompts = self._prompts()
        rows, cut = prompts.batch(list(inputs), prompt or "")
        self._count(cut)
        width = max((len(row.ids) for row in rows), default=0)
        # Masked, so any token may stand in the padding: the tokenizer needs no pad token.
        ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in rows], dtype=torch.long)
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], dtype=torch.long)
        features = {"input_ids": ids, "attention_mask": mask}
        if self.encoder_config.get("pool", "tokens") != "tokens":
            features["text_tokens"] = torch.tensor([[row.text_tokens, prompts.behind] for row in rows])
        return features

    def _prompts(self) -> "_Prompts":
        config = self.encoder_config
        kwargs, keep = config["chat_template_kwargs"], config.get("keep", "start")
        return _Prompts(self.tokenizer, config["template"], self.max_seq_length, kwargs, keep)

    def _count(self, cut: int) -> None:
        if cut and not self.truncated:
            log.warning(
                "texts of more than max_seq_length=%d tokens lose their %s; `model[0].truncated` counts them",
                self.max_seq_length,
                "start" if self.encoder_config.get("keep") == "end" else "end",
            )
        self.truncated += cut

    # --- tokens to embeddings ---------------------------------------------------------------------------------------

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Adds `sentence_embedding` and, as `token_embeddings`, the soft prompts `[B, n, d]`, in float32.

        `input_ids` and `attention_mask` may be padded on either side; `text_tokens` are those of the second text in
        each prompt and those behind it.
        """
        count = self.encoder_config["compression_tokens"]
        ids, mask = _padded_left(features["input_ids"], features["attention_mask"])
        embeds = self.backbone.get_input_embeddings()(ids)
        new = self.head.tokens.to(embeds).expand(len(ids), -1, -1)
        mask = torch.cat([mask, mask.new_ones(new.shape[:2])], dim=1)
        output = self.backbone.get_decoder()(
            inputs_embeds=torch.cat([embeds, new], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, -count:]
        soft = self.head.soft_prompts(hidden)
        made_of, mapped = hidden, soft
        if (pool := self.encoder_config.get("pool", "tokens")) != "tokens":
            texts = output.last_hidden_state[:, : ids.shape[1]]
            made_of = _pooled(texts, features["text_tokens"], hidden if pool == "both" else hidden[:, :0])
            mapped = self.head.soft_prompts(made_of)
        return {
            **features,
            "sentence_embedding": self.head.embedding(mapped, made_of),
            "token_embeddings": soft,
            "attention_mask": mask[:, -count:],
        }

    @torch.inference_mode()
    def decode(self, soft_prompts: Tensor, max_new_tokens: int = 64) -> list[str]:
        """What the language model without adapters writes greedily after soft prompts `[B, n, d]`."""
        embeds = soft_prompts.to(self.backbone.device, self.backbone.dtype)
        stops = self._stop_ids()
        with self._without_adapters():
            found = self.backbone.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                generation_config=_greedy(stops, max_new_tokens),
            ).tolist()
        ends = [next((at for at, token in enumerate(row) if token in stops), len(row)) for row in found]
        kept = [row[:end] for row, end in zip(found, ends, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def _stop_ids(self) -> list[int]:
        """EOS of the tokenizer, and of the language model's generation config."""
        named = self.backbone.generation_config.eos_token_id
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        return sorted(token for token in ids if token is not None)

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        layers = [module for module in self.backbone.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
                layer.requires_grad_(False)

    def get_embedding_dimension(self) -> int:
        """The width of an embedding."""
        config = self.encoder_config
        beside = config["hidden"] if self.head.share < 1 and not self.head.added else 0
        return int(config.get("rotated_width") or config["width"] + beside)

    def get_config_dict(self) -> dict[str, Any]:
        """Content of `encoder_config.json`."""
        return {**self.encoder_config, "max_query_tokens": self.max_seq_length}

    # --- folders ----------------------------------------------------------------------------------------------------

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write what `load` reads, always as safetensors, without the language model."""
        folder = Path(output_path)
        _write_json(folder / CONFIG_FILE, self.get_config_dict())
        _write_tensors(folder / WEIGHTS_FILE, self.head.state_dict())
        for kind, name in (("reading", READING_FILE), ("rotation", ROTATION_FILE)):
            if tensors := self.head.tensors(kind):
                _write_tensors(folder / name, tensors)
        self.save_tokenizer(output_path)
        _make_portable(folder / "tokenizer_config.json")
        if self._transform is not None:
            (folder / TRANSFORM_FILE).write_bytes(self._transform)
        if self.adapter_config is not None:
            (folder / ADAPTER).mkdir(exist_ok=True)
            _write_json(folder / ADAPTER / ADAPTER_CONFIG, self.adapter_config)
            _write_tensors(folder / ADAPTER / ADAPTER_WEIGHTS, _adapter_tensors(self.backbone))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> "LLM2VecGenEncoder":
        """Read a folder or a hub repository; the docstring of this file lists the `model_kwargs`.

        Raises:
            ValueError: it is no encoder, or the language model is another than it was trained on.
            OSError: the language model cannot be loaded.
            ImportError: transformers is older than 5, or the encoder has LoRA adapters, and peft is not installed.
        """
        # Version 4 loads a language model that 5 wrote with other position angles, without a word. Not every version of
        # sentence-transformers reads the folder's own requirements.
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"this encoder needs transformers 5 or later, {transformers.__version__} is installed")
        if backend != "torch":
            raise ValueError(f"backend '{backend}': this encoder runs on torch only")
        hub = {"token": token, "local_files_only": local_files_only}
        place = {**hub, "subfolder": subfolder, "cache_folder": cache_folder, "revision": revision}
        config = _checked(cls.load_config(model_name_or_path, **place), model_name_or_path)
        files = {name: cls.load_file_path(model_name_or_path, name, **place) for name in _head_files(config)}
        head = _load_head(config, files)
        tokenizer = AutoTokenizer.from_pretrained(
            model_name_or_path,
            **{**hub, "subfolder": subfolder, "cache_dir": cache_folder, "revision": revision},
            **{"trust_remote_code": False, **(processor_kwargs or {})},
        )
        options = {**hub, "cache_dir": cache_folder, **(config_kwargs or {}), **(model_kwargs or {})}
        backbone = _load_backbone(config, options)
        adapter_config = None
        if config.get("lora"):
            where = load_dir_path(model_name_or_path, **{**place, "subfolder": str(Path(subfolder) / ADAPTER)})
            adapter_config = _add_adapter(backbone, where)
        transform = cls.load_file_path(model_name_or_path, TRANSFORM_FILE, **place) if config.get("transform") else None
        content = None if transform is None else Path(transform).read_bytes()
        return cls(backbone, tokenizer, head, config, adapter_config, content)


class _Prompt(NamedTuple):
    """Token ids, and how many of them are the second text's, of the template `echo`."""

    ids: list[int]
    text_tokens: int


class _Prompts:
    """Texts as at most `limit` prompt tokens; of a longer text the side `keep` (start or end) is kept.

    `raw` is the text with the tokenizer's special tokens, `chat` the tokenizer's chat template around it, `echo` that
    with the text in it twice. A control token that a text spells is read as ordinary characters.

    Attributes:
        behind: tokens that the template writes behind a text.
    """

    def __init__(
        self, tokenizer: Any, template: str, limit: int, chat_template_kwargs: dict[str, Any], keep: str
    ) -> None:
        """Raises ValueError if the template is unknown, missing or longer than `limit`, or `keep` is unknown."""
        self._tokenizer, self._template, self._limit = tokenizer, template, limit
        self._kwargs, self._keep, self._in_parts = dict(chat_template_kwargs), keep, False
        if today := self._kwargs.get("strftime_now"):
            self._kwargs["strftime_now"] = datetime.fromisoformat(today).strftime
        added = {token.content: (id_, token) for id_, token in tokenizer.added_tokens_decoder.items()}
        special = {name for name, (_, token) in added.items() if token.special} | {*tokenizer.all_special_tokens}
        ordinary = {tokenizer.mask_token, tokenizer.unk_token}
        self._control = {name: entry for name, entry in added.items() if name in special - ordinary}
        spellings = sorted(self._control, key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._splitting = re.compile("|".join(map(self._with_space, spellings)) or r"(?!)")
        if keep not in ("start", "end"):
            raise ValueError(f"{CONFIG_FILE}: keep is '{keep}', known are start and end")
        if template not in ("raw", "chat", "echo"):
            raise ValueError(f"{CONFIG_FILE}: template is '{template}', known are raw, chat and echo")
        if template != "raw" and not tokenizer.chat_template:
            raise ValueError("this encoder needs its tokenizer's chat template, and the folder has none")
        self._twice = template == "echo"
        # Some templates print content parts only.
        self._in_parts = template != "raw" and not self._prints_strings()
        frame, *probes = self._ids(["", "Copper 7315", "Velvet 2846"])
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*map(reversed, probes), strict=False))
        self.behind = sum(1 for _ in alike)
        if len(frame) >= limit:
            raise ValueError(f"max_seq_length is {limit}, the {template} template takes {len(frame)} by itself")

    def batch(self, texts: list[str], prefix: str) -> tuple[list[_Prompt], int]:
        """The prompt of each text with `prefix` in front, and how many were truncated.

        Where a text keeps its end, or stands twice, `prefix` is never truncated; ValueError if it leaves it no room.
        """
        # Four characters a token is already long; beyond this bound tokenising the rest is wasted work.
        most = 64 * self._limit
        if self._keep == "start" and not self._twice:
            texts, prefix = [prefix + text for text in texts], ""
        bounded = [text[:most] if self._keep == "start" else text[-most:] for text in texts]
        rows, cut = [], 0
        for whole, left, ids in zip(texts, bounded, self._ids(bounded, prefix), strict=True):
            fits = len(ids) <= self._limit
            cut += not fits or len(left) < len(whole)
            kept, ids = (left, ids) if fits else self._cut(left, prefix)
            rows.append(_Prompt(ids or self._empty(), self._text_tokens(kept, len(ids)) if self._twice else 0))
        return rows, cut

    def _text_tokens(self, text: str, most: int) -> int:
        """As many as the text has by itself, behind a space."""
        options = {"split_special_tokens": bool(self._spelt.search(text)), "verbose": False}
        return min(max(1, len(self._tokenizer(f" {text}", add_special_tokens=False, **options)["input_ids"])), most)

    def _cut(self, text: str, prefix: str) -> tuple[str, list[int]]:
        """What fits of a text, and the ids of its prompt."""
        [nothing] = self._ids([""], prefix)
        if len(nothing) >= self._limit:
            raise ValueError(
                f"the prompt {prefix!r} takes {len(nothing)} tokens, template included, max_seq_length is "
                f"{self._limit}: nothing is left for a text"
            )
        offsets = self._offsets(text)
        copies = 2 if self._twice else 1
        count = min((self._limit - len(nothing)) // copies, len(offsets))
        while count > 0:
            left = text[: offsets[count - 1][1]] if self._keep == "start" else text[offsets[-count][0] :]
            [ids] = self._ids([left], prefix)
            if len(ids) <= self._limit:
                return left, ids
            count -= -(-(len(ids) - self._limit) // copies)
        return "", nothing

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        options = {"split_special_tokens": bool(self._spelt.search(text)), "verbose": False}
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
        return list(encoding["offset_mapping"])

    def _empty(self) -> list[int]:
        # Without a template and a start token an empty text has no token at all; EOS stands for it.
        if self._tokenizer.eos_token_id is None:
            raise ValueError("a text is empty, and the tokenizer names no EOS token to stand for it")
        return [int(self._tokenizer.eos_token_id)]

    def _ids(self, texts: list[str], prefix: str = "") -> list[list[int]]:
        if not texts:
            return []
        raw = self._template == "raw"
        contents = [prefix + (text.join(ECHO.split("{text}")) if self._twice else text) for text in texts]
        read = contents if raw else [self._rendered(content) for content in contents]
        rows = list(self._tokenizer(read, add_special_tokens=raw, verbose=False)["input_ids"])
        for row, content in enumerate(contents):
            if self._spelt.search(content):
                rows[row] = self._plain(content, special=True) if raw else self._apart(content)
        return rows

    def _apart(self, text: str) -> list[int]:
        """Ids of the template around a text in which only what the template writes becomes a control token."""
        free = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in text)
        marks = {spelt: next(free) for spelt in dict.fromkeys(self._spelt.findall(text))}
        back = {ord(mark): spelt for spelt, mark in marks.items()}
        rendered, ids, end = self._rendered(self._spelt.sub(lambda match: marks[match[0]], text)), [], 0
        for match in self._splitting.finditer(rendered):
            ids += self._plain(rendered[end : match.start()].translate(back))
            ids += [self._control[spelt][0] for spelt in self._spelt.findall(match[0])]
            end = match.end()
        return ids + self._plain(rendered[end:].translate(back))

    def _plain(self, text: str, special: bool = False) -> list[int]:
        options = {"split_special_tokens": True, "verbose": False}
        return list(self._tokenizer(text, add_special_tokens=special, **options)["input_ids"]) if text else []

    def _with_space(self, spelling: str) -> str:
        token = self._control[spelling][1]
        return (r"\s*" if token.lstrip else "") + re.escape(spelling) + (r"\s*" if token.rstrip else "")

    def _prints_strings(self) -> bool:
        try:
            return "copper 7315" in self._rendered("Copper 7315").lower()
        except Exception:  # a template may fail in any way
            return False

    def _rendered(self, text: str) -> str:
        message = [{"role": "user", "content": [{"type": "text", "text": text}] if self._in_parts else text}]
        return self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **self._kwargs)


def _greedy(stops: list[int], max_new_tokens: int) -> GenerationConfig:
    """Sets every value: unset ones (a repetition penalty) would come from the language model's file."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )


def _pooled(states: Tensor, text_tokens: Tensor, new: Tensor) -> Tensor:
    """Mean `[B, 1, d]` over the second text of each prompt and states `[B, k, d]` of new tokens.

    `states` `[B, T, d]` are padded on the left; `text_tokens` `[B, 2]` are those of the text, and those behind it.
    """
    from_end = torch.arange(states.shape[1], 0, -1, device=states.device) - 1
    own, behind = text_tokens.to(states.device).T[:, :, None]
    inside = ((from_end >= behind) & (from_end < behind + own)).float()
    sums = torch.einsum("bt,btd->bd", inside, states.float()) + new.float().sum(1)
    return (sums / (inside.sum(1, keepdim=True) + new.shape[1]))[:, None]


def _padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with all padding in front, so that the new tokens follow the last token of each."""
    order = mask.ne(0).long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.ne(0).long().gather(1, order)


# --- parts of a folder ----------------------------------------------------------------------------------------------


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    if not config:
        raise ValueError(f"{where} is not an LLM2Vec-Gen encoder: it has no {CONFIG_FILE}")
    if missing := sorted(_KEYS - config.keys()):
        raise ValueError(f"{where}: {CONFIG_FILE} lacks {', '.join(missing)}")
    return config


def _head_files(config: dict[str, Any]) -> list[str]:
    """The files that make the embedding."""
    needed = {
        WEIGHTS_FILE: True,
        READING_FILE: config.get("response_share", 1.0) < 1,
        ROTATION_FILE: config.get("rotated_width") is not None,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def _load_head(config: dict[str, Any], files: dict[str, str | None]) -> Head:
    """`files` has the path of each of `_head_files`, None for one that is missing."""
    for name, path in files.items():
        if path is None:
            raise ValueError(f"the folder has no {name}")
    tokens = config["thought_tokens"] + config["compression_tokens"]
    reading, rotation = (load_file(files[name]) if name in files else None for name in (READING_FILE, ROTATION_FILE))
    share, added = config.get("response_share", 1.0), config.get("response_form", "beside") == "added"
    decorrelated = config.get("decorrelate_reading", False)
    head = Head(config["hidden"], config["width"], tokens, share, reading, rotation, added, decorrelated)
    tensors, wanted = load_file(files[WEIGHTS_FILE]), head.state_dict()
    for name in sorted(tensors.keys() | wanted.keys()):
        found, expected = (list(part[name].shape) if name in part else None for part in (tensors, wanted))
        if found != expected:
            raise ValueError(f"{WEIGHTS_FILE}: {name} has shape {found}, {CONFIG_FILE} says {expected}")
    head.load_state_dict(tensors)
    return head


def _load_backbone(config: dict[str, Any], options: dict[str, Any]) -> Any:
    """The frozen language model; `options` that do not say which model go to `from_pretrained`."""
    recorded = config["backbone"]
    asked = options.pop("backbone", None) or os.environ.get(BACKBONE_VARIABLE) or recorded["name"]
    anyway = options.pop("allow_other_backbone", False)
    name = str(Path(asked).expanduser()) if Path(asked).expanduser().is_dir() else str(asked)
    revision = options.pop("revision", None) or (recorded.get("revision") if name == recorded["name"] else None)
    options.setdefault("dtype", options.pop("torch_dtype", torch.float32))
    options.setdefault("trust_remote_code", False)
    _check_identity(recorded, name, revision, anyway)
    try:
        backbone = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError) as error:
        what = f"{name} at revision {revision}" if revision else name
        reason = f"{str(error).strip()}\nIf it lies elsewhere, {_ELSEWHERE}"
        raise OSError(f"cannot load the backbone {what}: {reason}") from error
    found = backbone.get_input_embeddings().weight.shape[1]
    if found != config["hidden"]:
        raise ValueError(f"the backbone {name} has hidden size {found}, the encoder was trained on {config['hidden']}")
    return backbone.eval().requires_grad_(False)


def _check_identity(recorded: dict[str, str], name: str, revision: str | None, anyway: bool) -> None:
    """ValueError if the model called `name` is known to be another, OSError if it is missing."""
    expected = recorded.get("sha256") or f"revision {recorded.get('revision')}"
    if Path(name).is_dir():
        found = _sha256(Path(name)) if "sha256" in recorded else _snapshot(Path(name), recorded.get("revision", ""))
        if found is None and not anyway:
            log.warning("%s: nothing here tells whether it is %s at %s", name, recorded["name"], expected)
        same = found in (None, expected)
    elif "sha256" in recorded and name == recorded["name"]:
        raise OSError(f"the backbone is the folder {name}, which is not here: {_ELSEWHERE}")
    else:
        found = f"revision {revision}"
        same = "sha256" not in recorded and (name, revision) == (recorded["name"], recorded.get("revision"))
    if not (same or anyway):
        raise ValueError(
            f"the backbone {name} is {found}, the encoder was trained on {recorded['name']}, which is {expected}: "
            "its embeddings would mean nothing. Give that model, or take this one all the same by "
            "model_kwargs={'allow_other_backbone': True}"
        )


def _sha256(folder: Path) -> str:
    """sha256 over the files that decide what a model computes."""
    files = sorted({path for pattern in _IDENTITY_FILES for path in folder.rglob(pattern)})
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _snapshot(folder: Path, recorded: str) -> str | None:
    """The commit in the name of a folder of the hub's cache, if the recorded revision is a commit too."""
    name = folder.resolve().name
    commits = all(re.fullmatch("[0-9a-f]{40}", commit) for commit in (name, recorded))
    return f"revision {name}" if commits else None


def _add_adapter(backbone: Any, folder: str | None) -> dict[str, Any]:
    """Put the LoRA adapters of a folder into the language model; returns their peft config."""
    if folder is None:
        raise ValueError(f"{CONFIG_FILE} says lora, and the folder has no {ADAPTER}/")
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError("this encoder has LoRA adapters, which need peft: pip install peft") from None
    PeftModel.from_pretrained(backbone, folder)
    backbone.eval()
    content: dict[str, Any] = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return content


def _adapter_tensors(backbone: Any) -> dict[str, Tensor]:
    """The LoRA matrices under peft's names."""
    return {
        "base_model.model." + name.replace(".default.", "."): parameter
        for name, parameter in backbone.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _make_portable(tokenizer_config: Path) -> None:
    """Name the generic tokenizer class of transformers 5 as version 4 does, and drop where it was loaded from."""
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    origin = ("is_local", "local_files_only")
    _write_json(tokenizer_config, {name: value for name, value in settings.items() if name not in origin})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
