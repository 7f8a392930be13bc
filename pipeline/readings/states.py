"""One forward pass over a text and the states that readings are made of, kept on disk.

| template     | what the backbone reads                                                     | what is pooled          |
|--------------|-----------------------------------------------------------------------------|-------------------------|
| bare         | the text alone                                                              | text, last              |
| echo         | the text twice (Springer et al. 2024)                                       | text                    |
| prompt       | the student's prompt with instruction and text, then the new tokens         | tokens, text, last      |
| prompt-twice | the same with the text twice in the user's turn                             | tokens, text, both      |

`text` is the mean over the tokens of the text's last occurrence, `last` the state at the last token before the new
ones, `tokens` the mean over the compression tokens, `both` the mean over the tokens of `text` and `tokens` together.
All pools of a template come from one pass.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.attention.segments import shared_prefix
from pipeline.backbone.chat_template import ChatTemplate
from pipeline.backbone.loading import Template
from pipeline.backbone.prompting import SLOT, join_instruction
from pipeline.core.code_digest import code_digest
from pipeline.core.files import bytes_sha256
from pipeline.embed.teachers.template import TEMPLATES, TemplateTokenizer, Tokens
from pipeline.encoder.passes.packed import least_saved
from pipeline.encoder.passes.prompt_reader import Beginning, PromptReader
from pipeline.optim.batching import token_batches
from pipeline.tasks.instructions import Side

log = logging.getLogger(__name__)

Pool = Literal["text", "last", "tokens", "both"]
# Modules that decide a state with all they import: an edit there voids the kept ones.
CODE = ("pipeline.readings.states",)


@dataclass(frozen=True)
class ReadingTemplate:
    """How a text is put before the backbone, and what is pooled of the pass.

    Attributes:
        prompted: within the student's prompt, behind the instruction and before the new tokens; else bare.
        twice: the text stands twice.
    """

    prompted: bool
    twice: bool
    pools: tuple[Pool, ...]


READING_TEMPLATES: Mapping[str, ReadingTemplate] = {
    "bare": ReadingTemplate(prompted=False, twice=False, pools=("text", "last")),
    "echo": ReadingTemplate(prompted=False, twice=True, pools=("text",)),
    "prompt": ReadingTemplate(prompted=True, twice=False, pools=("tokens", "text", "last")),
    "prompt-twice": ReadingTemplate(prompted=True, twice=True, pools=("tokens", "text", "both")),
}


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone and how the student reads prompts with it.

    Attributes:
        model: the causal LM, in eval mode.
        reader: of its prompts.
        new_tokens: rows of the student's new tokens `[N, d]`.
        read: how many of them, the last ones, are compression tokens.
        max_tokens: longest prompt without the new tokens; each copy of a text that stands twice may be as long.
        batch_tokens: most tokens of one forward pass.
        identity: what pins weights and precision.
    """

    model: Any
    tokenizer: Any
    reader: PromptReader
    new_tokens: Tensor
    read: int
    template: Template
    chat_template_kwargs: Mapping[str, Any]
    max_tokens: int
    batch_tokens: int
    identity: Mapping[str, Any]


class TemplateStates:
    """A `System` whose embedding is the pools of a template side by side, `[N, pools * d]`."""

    def __init__(self, name: str, backbone: FrozenBackbone) -> None:
        """`name` is a key of `READING_TEMPLATES`.

        Raises:
            TeacherError: the template leaves no room for a text.
            BackboneError: the prompt is a chat, and the tokenizer has no chat template.
        """
        self.name, self._backbone, self._template = f"states of {name}", backbone, READING_TEMPLATES[name]
        self.pools, self.width = self._template.pools, int(backbone.model.config.get_text_config().hidden_size)
        tokens = backbone.new_tokens if self._template.prompted else backbone.new_tokens[:0]
        self._tokens, self._frames = tokens, lru_cache(maxsize=64)(self._frame)
        self.prompting = self._wrapped("")
        self.identity: dict[str, Any] = {
            "backbone": dict(backbone.identity),
            "pools": list(self.pools),
            "new_tokens": bytes_sha256(tokens.float().cpu().numpy().tobytes()),
            "read": backbone.read,
            "max_tokens": self._frames("")[0].max_tokens,
            "code": _code(),
        }

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        """What is read, and how much of it is the instruction, which is not pooled."""
        read = instruction if self._template.prompted else ""
        return f"{len(read)} {join_instruction(read, text)}"

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Pools float32 `[len(texts), pools * d]`, in the order of `pools`."""
        if not texts:
            return np.zeros((0, len(self.pools) * self.width), np.float32)
        tokenizer, tail = self._frames(instruction if self._template.prompted else "")
        rows = tokenizer(texts)
        texts_at = [_text_tokens(row, tail) for row in rows]
        shared, beginning = self._beginning(rows, texts_at)
        costs = np.array([len(row.ids) - shared + len(self._tokens) + beginning.read_again for row in rows])
        result = np.empty((len(rows), len(self.pools) * self.width), np.float32)
        reader = self._backbone.reader
        for batch in token_batches(costs, self._backbone.batch_tokens, padded=reader.padded):
            rests = [rows[at].ids[shared:] for at in batch]
            states = reader.read_all(beginning, rests, self._tokens)
            pooled = [self._pooled(state, texts_at[at], shared) for at, state in zip(batch, states, strict=True)]
            result[batch] = torch.stack(pooled).float().cpu().numpy()
        return result

    def _pooled(self, states: Tensor, text: slice, shared: int) -> Tensor:
        """`[pools * d]` of the states `[T, d]` behind the `shared` tokens of a beginning."""
        own = states[text.start - shared : text.stop - shared]
        tokens = states[len(states) - self._backbone.read :]
        pools: dict[Pool, Tensor] = {"text": own.mean(0), "last": states[len(states) - len(self._tokens) - 1]}
        if self._template.prompted:
            pools |= {"tokens": tokens.mean(0), "both": torch.cat([own, tokens]).mean(0)}
        return torch.cat([pools[pool] for pool in self.pools])

    def _beginning(self, rows: Sequence[Tokens], texts_at: Sequence[slice]) -> tuple[int, Beginning]:
        """Tokens that all rows begin with and none pools, read once where that pays."""
        shared = min(shared_prefix([row.ids for row in rows]), *(text.start for text in texts_at), 10**9)
        if shared * (len(rows) - 1) < least_saved(self._tokens.device):
            shared = 0
        return shared, self._backbone.reader.begin(rows[0].ids[:shared] if shared else [])

    def _frame(self, instruction: str) -> tuple[TemplateTokenizer, int]:
        """What makes tokens of texts under an instruction, and the tokens of the template after the text."""
        template, tokenizer = self._wrapped(instruction), self._backbone.tokenizer
        special = not (self._template.prompted and self._backbone.template == "chat")
        frame = tokenizer(template.replace(SLOT, ""), add_special_tokens=special, verbose=False)["input_ids"]
        # The student's limit includes its template; where a text stands twice, each copy has it.
        limit = len(frame) + 2 * self._backbone.max_tokens if self._template.twice else self._backbone.max_tokens
        positions = getattr(self._backbone.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:
            limit = min(limit, int(positions) - len(self._tokens))
        tail = tokenizer(template.rpartition(SLOT)[2], add_special_tokens=False, verbose=False)["input_ids"]
        return TemplateTokenizer(tokenizer, max_tokens=limit, template=template, special_tokens=special), len(tail)

    def _wrapped(self, instruction: str) -> str:
        """The template with its slots, under an instruction."""
        content = TEMPLATES["echo"] if self._template.twice else SLOT
        if not self._template.prompted:
            return content
        content = join_instruction(instruction, content)
        if self._backbone.template == "raw":
            return content
        return ChatTemplate(self._backbone.tokenizer, self._backbone.chat_template_kwargs).render(content)


@cache
def _code() -> str:
    return code_digest(CODE)


def _text_tokens(row: Tokens, tail: int) -> slice:
    """Where the text's last occurrence stands, without the `tail` tokens of the template after it.

    An empty text has no token of its own: what follows it is pooled.
    """
    pooled = [at for at, flag in enumerate(row.pooled) if flag]
    own = [at for at in pooled if at < len(row.ids) - tail] or pooled
    return slice(own[0], own[-1] + 1)
