"""LLM2Vec (BehnamGhader et al. 2024): a language model with bidirectional attention and trained adapters.

The recipe: the base model; the adapter of masked next-token prediction (MNTP) merged into it; the adapter of
unsupervised SimCSE merged on top; attention in both directions; the mean over the text's tokens. It is the teacher of
LLM2Vec-Gen, with the backbone as its base.

What is read and pooled follows the released checkpoints:

- The bare text, stripped, with the tokenizer's own special tokens (BOS for Llama, none for Qwen). The `llm2vec` library
  wraps the texts of a few bases only (Llama-3-8B-Instruct, Llama-2-chat, Mistral-Instruct, gemma-2-it, Qwen2-Instruct),
  and none of the eleven presets is among them; `template` does it for those.
- The mean is over the text's tokens. The library leaves an instruction and the BOS out, so does `mean` here. The
  reference implementation of LLM2Vec-Gen averages the BOS in as well when it makes targets: `mean-all`. The two are one
  and the same for Qwen, which has no BOS.
- The tokenizer is that of the first adapter that ships one: MNTP made `_` its mask token, so that it is a token of its
  own there and not in the base's tokenizer. Otherwise the base's.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
from pipeline.core.errors import BackboneError, TeacherError
from pipeline.embed.teachers.adapters import TOKENIZER, fetch_adapter, merge_adapter
from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
from pipeline.embed.teachers.pooling import PooledTeacher, TextPooler, check_positions
from pipeline.embed.teachers.template import SLOT, Pooling, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 1


class Llm2VecTeacher(PooledTeacher):
    """The mean over a text's own tokens of the last (final-normed) hidden states, attention in both directions."""

    def __init__(
        self,
        body: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        batch_size: int,
        identity: dict[str, Any],
        template: str = SLOT,
        pooling: Pooling = "mean",
    ) -> None:
        """Take a loaded model as it is, on the device it is on.

        Args:
            body: a transformer without its head, bidirectional, in eval mode.
            tokenizer: its tokenizer.
            max_tokens: longer texts lose their end.
            batch_size: texts of one forward pass.
            identity: what pins the embeddings; `name` is used in messages.
            template: what is read, see `reading`.
            pooling: which of its tokens are pooled, see `reading`.

        Raises:
            TeacherError: the model is causal, padding changes its rows, or the template leaves no room for a text.
        """
        check_bidirectional(body, str(identity["name"]))
        reader = Reader(tokenizer, max_tokens=max_tokens, template=template, pooling=pooling, strip=True)
        super().__init__(TextPooler(body, reader, batch_size=batch_size), identity)

    @classmethod
    def load(
        cls,
        base: BackboneParams,
        adapters: Sequence[tuple[str, str | None]],
        *,
        max_tokens: int,
        batch_size: int,
        template: str = SLOT,
        pooling: Pooling = "mean",
    ) -> "Llm2VecTeacher":
        """Load the base onto the best device and merge the adapters into it.

        Args:
            base: the base model.
            adapters: names and revisions, in the order they are merged.
            max_tokens: longer texts lose their end.
            batch_size: texts of one forward pass.
            template: what is read, see `reading`.
            pooling: which of its tokens are pooled, see `reading`.

        Raises:
            TeacherError: base or adapters cannot be loaded or do not fit each other, or see the constructor.
        """
        device = best_device()
        log.info("teacher %s: device %s (the best present), %s", base.name, device, base.dtype)
        folders = [fetch_adapter(name, revision) for name, revision in adapters]
        identity = {
            **_identify(base.name, base.revision, "name"),
            "adapters": [_identify(name, revision, "adapters") for name, revision in adapters],
            "kind": "llm2vec",
            "version": VERSION,
            "template": template,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "dtype": base.dtype,
        }
        tokenizer = _tokenizer(base, folders)
        body = _body(base, device)
        check_positions(body.config, max_tokens, "base model")
        for (name, _), folder in zip(adapters, folders, strict=True):
            body = merge_adapter(body, folder, name)
        make_bidirectional(body)
        return cls(
            body,
            tokenizer,
            max_tokens=max_tokens,
            batch_size=batch_size,
            identity=identity,
            template=template,
            pooling=pooling,
        )


def _identify(name: str, revision: str | None, key: str) -> dict[str, str]:
    try:
        return identify(name, revision)
    except BackboneError as error:
        raise TeacherError(f"embed.teacher.{key}: {error}") from None


def _body(base: BackboneParams, device: str) -> "PreTrainedModel":
    try:
        return load_backbone(base, device).get_decoder()
    except BackboneError as error:
        raise _of_base(error) from None


def _tokenizer(base: BackboneParams, folders: Sequence[Path]) -> "PreTrainedTokenizerBase":
    shipped = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
    log.info("teacher %s: tokenizer of %s", base.name, f"the adapter {shipped}" if shipped else "the base model")
    source = BackboneParams(name=str(shipped)) if shipped else base
    try:
        return load_tokenizer(source)
    except BackboneError as error:
        raise _of_base(error) from None


def _of_base(error: BackboneError) -> TeacherError:
    return TeacherError(f"embed.teacher.name: {str(error).removeprefix('backbone.name: ')}")
