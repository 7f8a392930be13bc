"""Systems that an embedder is compared with besides its teacher: pooling of the backbone, HyDE, published models.

- backbone-mean: the mean of the backbone's last hidden states over the text.
- echo (Springer et al. 2024): the text stands twice; the mean is over its second copy, for which a causal model has
  already read all of the text.
- hyde (Gao et al. 2023): the backbone answers instruction + text of a query, and the teacher embeds that one answer;
  documents are embedded as they are. It costs a generation for each query.
- any sentence-transformers model, with its own prompts.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import DType, identify
from pipeline.backbone.prompting import SLOT, join_instruction
from pipeline.embed.teachers.template import TEMPLATES, TemplateTokenizer
from pipeline.evaluate.registry import BUILT_IN
from pipeline.evaluate.system import BARE, BareSystem
from pipeline.parallel.devices import Places
from pipeline.tasks.instructions import Side

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder
    from pipeline.generate.answer_cache import Answers

log = logging.getLogger(__name__)

HYDE_VERSION = 1
MODEL_VERSION = 1

# Keys under which sentence-transformers models store their prompt of a side; the first that exists counts.
_PROMPT_KEYS: dict[Side, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


def pooled(name: str, encoder: "Encoder", batch_tokens: int | None = None) -> BareSystem:
    """Mean pooling of the encoder's own backbone, which stays shared, of the template that the registry has for `name`.

    With echo each copy of a text may be as long as the student reads it, as far as the backbone's positions allow.
    """
    return _bare(name, _pooling_teacher(name, lambda: encoder, batch_tokens))


@contextmanager
def pooled_in_processes(
    name: str, load: "Callable[[], Encoder]", batch_tokens: int | None, places: Places
) -> Iterator[BareSystem]:
    """`pooled` in several processes that share the texts of a call; `load` (picklable) runs in each of them."""
    from pipeline.embed.teachers.pool import ParallelTeacher

    load_teacher = partial(_pooling_teacher, name, load, batch_tokens)
    with closing(ParallelTeacher(load_teacher, places, batch_tokens)) as teacher:
        yield _bare(name, teacher)


def _bare(name: str, teacher: "Teacher") -> BareSystem:
    template = TEMPLATES[BUILT_IN[name].template]
    prompting = BARE if template == SLOT else f"bare text twice: {template!r}, pooled over the second"
    return BareSystem(name, teacher.identity, teacher, prompting)


def _pooling_teacher(name: str, load: "Callable[[], Encoder]", batch_tokens: int | None) -> "Teacher":
    from pipeline.embed.teachers.backbone import VERSION
    from pipeline.embed.teachers.pooling import PooledTeacher

    encoder, template = load(), TEMPLATES[BUILT_IN[name].template]
    max_tokens = encoder.max_tokens if template == SLOT else _echo_tokens(template, encoder)
    identity: dict[str, Any] = {
        "pooling": "mean",
        "version": VERSION,
        "max_tokens": max_tokens,
        "backbone": encoder.config.backbone,
    }
    if template != SLOT:
        identity["template"] = template
    tokenizer = TemplateTokenizer(encoder.tokenizer, max_tokens=max_tokens, template=template)
    return PooledTeacher(encoder.model.get_decoder(), tokenizer, batch_tokens=batch_tokens, identity=identity)


def _echo_tokens(template: str, encoder: "Encoder") -> int:
    """Tokens of the whole template that leave the student's `max_tokens` to each copy of the text."""
    frame = len(encoder.tokenizer(template.replace(SLOT, ""))["input_ids"])
    wanted = frame + 2 * encoder.max_tokens
    positions = getattr(encoder.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or wanted <= positions:
        return wanted
    log.info("echo: %d tokens for both copies of a text (the backbone's positions), not %d", positions, wanted)
    return int(positions)


@dataclass
class HydeSystem:
    """The teacher's embedding of the backbone's answer; the caller owns and closes `answers`.

    `failed` counts queries that the engine failed on. Another run may succeed, so results that include them are not
    stored.
    """

    answers: "Answers"
    teacher: "Teacher"
    prompting: str
    name: str = "hyde"
    failed: int = 0
    _unanswered: frozenset[str] = frozenset()

    @property
    def identity(self) -> dict[str, Any]:
        return {"version": HYDE_VERSION, "teacher": self.teacher.identity, "answers": self.answers.identity}

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return f"read: {text}" if side == "document" else f"answer: {join_instruction(instruction, text)}"

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Embeddings float32 [len(texts), d]: of a query's answer, of a document itself."""
        return self.teacher.embed(texts if side == "document" else self._answered(texts, instruction))

    def prepare(self, texts: Sequence[str], instruction: str, side: Side) -> None:
        """Have all queries of a call answered, so that the engine starts once; the store keeps the answers.

        Those that it failed on are not asked again before the next call: a chunk would start the engine anew for them.
        """
        prompts = [] if side == "document" else [join_instruction(instruction, text) for text in texts]
        answers = zip(prompts, self.answers(prompts) if prompts else [], strict=True)
        self._unanswered = frozenset(prompt for prompt, answer in answers if answer is None)

    def _answered(self, texts: Sequence[str], instruction: str) -> list[str]:
        prompts = [join_instruction(instruction, text) for text in texts]
        asked = [prompt for prompt in prompts if prompt not in self._unanswered]
        given = dict(zip(asked, self.answers(asked), strict=True))
        answers = [given.get(prompt) for prompt in prompts]
        self.failed += answers.count(None)
        embedded = [answer if answer and answer.strip() else None for answer in answers]
        if blank := embedded.count(None):
            log.warning("hyde: %d of %d answers are blank or failed: the text itself is embedded", blank, len(texts))
        return [answer or text for answer, text in zip(embedded, texts, strict=True)]


class ModelSystem:
    """A sentence-transformers model, with a prompt for each side."""

    def __init__(
        self,
        key: str,
        name: str,
        *,
        revision: str | None,
        max_tokens: int,
        dtype: DType,
        batch_size: int,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model `name` (hub or folder) onto the best device; `key` is the system's name.

        `max_tokens` is at most the model's own limit; longer texts lose their end. A prompt of None is the model's own,
        "" none. Raises TeacherError if the model cannot be loaded.
        """
        from pipeline.embed.teachers.sentence_transformers import limit_tokens, load_model

        device = best_device()
        log.info("%s: device %s (the best present), %s", key, device, dtype)
        self.name, self._batch_size = key, batch_size
        self._model = load_model(name, revision, dtype, device, trust_remote_code)
        limit = limit_tokens(self._model, name, max_tokens)
        prompts: dict[Side, str | None] = {"query": query_prompt, "document": document_prompt}
        self._prompts = {side: _own_prompt(self._model, side) if it is None else it for side, it in prompts.items()}
        self.identity = {
            **identify(name, revision),
            "kind": "sentence-transformers",
            "version": MODEL_VERSION,
            "max_tokens": limit,
            "dtype": dtype,
            "prompts": self._prompts,
        }
        self._one_sided = self._prompts["query"] == self._prompts["document"] and not _has_routes(self._model)

    @property
    def prompting(self) -> str:
        if not any(self._prompts.values()):
            return BARE
        return ", ".join(f"{side} prompt {prompt!r}" for side, prompt in self._prompts.items())

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        """Prompt and text, and the side where the model distinguishes them."""
        prompted = self._prompts[side] + text
        return prompted if self._one_sided else f"{side}: {prompted}"

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Embeddings float32 [len(texts), d] of prompt + text; `instruction` is not used."""
        if not texts:
            return np.zeros((0, int(self._model.get_embedding_dimension())), np.float32)
        encode = self._model.encode_query if side == "query" else self._model.encode_document
        vectors = encode(
            list(texts),
            prompt=self._prompts[side],
            batch_size=self._batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.asarray(vectors, dtype=np.float32)


def _own_prompt(model: Any, side: Side) -> str:
    """The prompt that a sentence-transformers model itself puts before the texts of a side, "" if none."""
    return next((model.prompts[key] for key in _PROMPT_KEYS[side] if model.prompts.get(key)), "")


def _has_routes(model: Any) -> bool:
    """Whether queries and documents pass different modules of the model."""
    from sentence_transformers.base.modules import Router

    return any(isinstance(module, Router) for module in model.modules())
