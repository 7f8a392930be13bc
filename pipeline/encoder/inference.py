"""A trained encoder in use: texts in, embeddings or soft prompts out, one forward pass, nothing generated."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.attention.segments import shared_prefix
from pipeline.backbone.loading import Pool
from pipeline.backbone.prompting import FormattedPrompt, PromptFormatter, eos_token_id, join_instruction
from pipeline.core.errors import SourceError, TrainingError
from pipeline.core.files import file_sha256
from pipeline.core.run import progress
from pipeline.core.target_transform import TRANSFORM_FILE, Space, TargetTransform, load_transform
from pipeline.encoder.embedded_by import check_instruction
from pipeline.encoder.folder.config import START_FILE, EncoderConfig
from pipeline.encoder.folder.tensors import read_start
from pipeline.encoder.head import EmbeddingHead, Reading, Rotation
from pipeline.encoder.passes.packed import least_saved
from pipeline.encoder.passes.plain import Pooled, pooled_of
from pipeline.encoder.passes.prompt_reader import PromptReader, prompt_reader
from pipeline.encoder.student import Student, new_student
from pipeline.optim.batching import token_batches, token_budget


class Embedded(NamedTuple):
    """Embeddings float32 `[N, width]`, and how many of the N texts were cut to fit."""

    vectors: np.ndarray
    truncated: int


class Encoder:
    """A frozen backbone with its student.

    Attributes:
        model: the backbone; it still answers as before.
        max_tokens: longest prompt without the new tokens; longer texts keep the side that `config.keep` names.
        identity: what pins the weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        student: Student,
        config: EncoderConfig,
        identity: dict[str, Any],
        adapted: Any = None,
        folder: Path | None = None,
        reading: Reading | None = None,
        rotation: Rotation | None = None,
        reader: PromptReader | None = None,
    ) -> None:
        """From loaded parts; `read_encoder` loads them from a folder.

        `adapted` is the backbone with adapters, which embeds; None: `model` does. `folder` holds the transform of the
        targets, if there is one, and the student before its first step. `reading` is needed at a response share below
        1. `reader` is of the model that embeds; None: the fastest one.
        """
        self._folder = folder
        self.model, self.tokenizer, self.student, self.config = model, tokenizer, student.eval(), config
        self.head = EmbeddingHead(
            student,
            config.response_share,
            reading,
            rotation,
            config.response_form,
            decorrelated=config.decorrelate_reading,
        )
        self.width, self.max_tokens, self.identity = self.head.width, config.max_query_tokens, identity
        self._reader = reader or prompt_reader(model if adapted is None else adapted)
        self._has_adapters = adapted is not None
        self._format = PromptFormatter(
            tokenizer, config.template, config.max_query_tokens, config.chat_template_kwargs, config.keep
        )

    @property
    def parameter_count(self) -> int:
        return sum(tensor.numel() for part in (self.model, self.student) for tensor in part.parameters())

    def untrained(self, seed: int) -> "Encoder":
        """The backbone without adapters, with an untrained student: random projections."""
        return self._without_adapters(self._new_student(seed), {"name": "untrained", "seed": seed}, 1.0)

    def untrained_reading(self, seed: int) -> "Encoder":
        """As `untrained`, but it embeds as the mean hidden state over its compression tokens, `[d]`."""
        identity = {"name": "untrained", "seed": seed, "read": "mean hidden state"}
        return self._without_adapters(self._new_student(seed), identity, 0.0)

    def at_start(self) -> "Encoder":
        """The student after its closed-form start, or whatever its start was, and before the first step.

        Raises TrainingError if the encoder's folder does not hold it.
        """
        student, reading = read_start(self._folder, self.config)
        identity = {"name": "start", "sha256": file_sha256(self._folder / START_FILE)} if self._folder else {}
        share = self.config.response_share
        return self._without_adapters(student.to(self.model.device), identity, share, reading)

    def start_reading(self) -> Reading | None:
        """The reading that training fitted before its first step, if it read with the new tokens that this one has."""
        if self._folder is None or not (self._folder / START_FILE).is_file():
            return None
        start, reading = read_start(self._folder, self.config)
        return reading if torch.equal(start.tokens, self.student.tokens.cpu()) else None

    @cached_property
    def _reader_without_adapters(self) -> PromptReader:
        return prompt_reader(self.model) if self._has_adapters else self._reader

    def _new_student(self, seed: int) -> Student:
        return new_student(
            self.model,
            self.config.width,
            compression_tokens=self.config.compression_tokens,
            thought_tokens=self.config.thought_tokens,
            seed=seed,
        )

    def _without_adapters(
        self, student: Student, identity: dict[str, Any], share: float, reading: Reading | None = None
    ) -> "Encoder":
        """The backbone without adapters behind another student."""
        identity = {**identity, "backbone": self.identity.get("other_backbone", self.config.backbone)}
        config = self.config.model_copy(update={"response_share": share, "rotated_width": None})
        return Encoder(
            self.model,
            self.tokenizer,
            student,
            config,
            identity,
            folder=self._folder,
            reading=reading,
            reader=self._reader_without_adapters,
        )

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        show_progress: bool = False,
        space: Space = "trained",
    ) -> np.ndarray:
        """Embeddings float32 `[len(texts), width]`, not normalised: compare them by cosine.

        A warning counts the texts that were truncated to `max_tokens`.

        Args:
            texts: any strings.
            instruction: put before each text, e.g. "Generate a passage that best answers this question:".
            batch_tokens: most tokens in one forward pass, new tokens included; texts of similar length share a pass, a
                longer one has its own. None: by the device.
            show_progress: show a bar.
            space: "trained", or "teacher": the space of the teacher's vectors before the transform of the targets, of
                width `width_of("teacher")`. Without a transform the two are one. At a response share below 1 it is the
                space of the predicted response alone.

        Raises:
            SourceError: an item is not a text, or the space is unknown.
            TrainingError: an embedding is not finite, or the transform is missing from the encoder's folder.
        """
        found = self.embed(
            texts, instruction=instruction, batch_tokens=batch_tokens, show_progress=show_progress, space=space
        )
        self.config.warn_of_truncated(found.truncated, len(texts))
        return found.vectors

    def embed(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        show_progress: bool = False,
        space: Space = "trained",
    ) -> Embedded:
        """As `encode`, but returns the number of truncated texts in place of the warning."""
        self.width_of(space)  # checks before the work
        prompts, truncated = self._prompts(texts, instruction)
        pooled = pooled_of(prompts, self.config.pool)
        vectors = self._batched(prompts, batch_tokens, self.head, (self.width,), show_progress, pooled)
        return Embedded(self.in_space(space, vectors), truncated)

    def encode_beside(
        self,
        others: "Sequence[Encoder]",
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
    ) -> list[np.ndarray]:
        """As `encode` of this encoder and of `others`, which differ in their heads alone: one forward pass for all."""
        heads = [self.head, *(other.head for other in others)]
        ends = np.cumsum([head.width for head in heads])
        prompts, truncated = self._prompts(texts, instruction)
        self.config.warn_of_truncated(truncated, len(texts))
        vectors = self._batched(
            prompts,
            batch_tokens,
            lambda states: torch.cat([head(states) for head in heads], dim=1),
            (int(ends[-1]),),
            pooled=pooled_of(prompts, self.config.pool),
        )
        return np.split(vectors, ends[:-1], axis=1)

    def reads_as(self, other: "Encoder") -> bool:
        """Whether two variants of one encoder embed the same hidden states: those of the same new tokens."""
        return self._reader is other._reader and torch.equal(self.student.tokens, other.student.tokens)

    def in_space(self, space: Space, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings of the trained space `[N, width]` in another, `[N, width_of(space)]`."""
        transform = self._transform_to(space)
        if space == "teacher":
            embeddings = self.head.predictions(embeddings)
        return embeddings if transform is None else transform.invert(embeddings)

    def width_of(self, space: Space) -> int:
        transform = self._transform_to(space)
        if transform is not None:
            return transform.teacher_width
        return self.width if space == "trained" else self.config.width

    def _transform_to(self, space: Space) -> TargetTransform | None:
        if space not in get_args(Space):
            raise SourceError(f"space is {space!r}: known are {' and '.join(map(repr, get_args(Space)))}")
        if space == "teacher" and self.config.response_share < 1 and self.config.response_form == "added":
            raise TrainingError(
                "the teacher's space is that of the predicted response alone, which cannot be taken out of a sum: "
                "`python -m pipeline mix --response-share 1` makes an encoder that gives it"
            )
        return self._transform if space == "teacher" else None

    @cached_property
    def _transform(self) -> TargetTransform | None:
        recorded = self.config.transform
        if recorded is None:
            return None
        found = load_transform(self._folder) if self._folder else None
        if found is None or found.identity != recorded:
            raise TrainingError(
                f"{self._folder}: {TRANSFORM_FILE} is missing or not the one that this encoder's targets had (sha256 "
                f"{recorded['sha256'][:12]}...): without it there is no way back to the teacher's space"
            )
        return found

    def soft_prompts(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None
    ) -> np.ndarray:
        """Soft prompts float32 `[len(texts), n, d]`, which the backbone decodes into answers. See `encode`."""
        return self._at_tokens(texts, instruction, batch_tokens, self.student.soft_prompts)

    def hidden_states(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None
    ) -> np.ndarray:
        """Final-normed hidden states float32 `[len(texts), n, d]` at the compression tokens. See `encode`."""
        return self._at_tokens(texts, instruction, batch_tokens, lambda hidden: hidden)

    def states(self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None) -> np.ndarray:
        """Hidden states as `Student` takes them: behind the mean that embeddings are made of, if it is another one."""
        return self._at_tokens(texts, instruction, batch_tokens, lambda states: states, self.config.pool)

    def _at_tokens(
        self,
        texts: Sequence[str],
        instruction: str,
        batch_tokens: int | None,
        head: Callable[[Tensor], Tensor],
        pool: Pool = "tokens",
    ) -> np.ndarray:
        prompts, truncated = self._prompts(texts, instruction)
        self.config.warn_of_truncated(truncated, len(texts))
        shape = self.config.compression_tokens + (pool != "tokens"), self.config.hidden
        return self._batched(prompts, batch_tokens, head, shape, pooled=pooled_of(prompts, pool))

    def _prompts(self, texts: Sequence[str], instruction: str) -> tuple[list[FormattedPrompt], int]:
        check_texts(texts)
        check_instruction(instruction)
        prompts = self._format.batch(texts, join_instruction(instruction, ""))
        return prompts, sum(prompt.truncated for prompt in prompts)

    @torch.inference_mode()
    def _batched(
        self,
        prompts: Sequence[FormattedPrompt],
        batch_tokens: int | None,
        head: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        show_progress: bool = False,
        pooled: Pooled | None = None,
    ) -> np.ndarray:
        result = np.empty((len(prompts), *shape), dtype=np.float32)
        # Without a template and a start token an empty text has no token: EOS represents it.
        ids = [prompt.token_ids or [eos_token_id(self.tokenizer)] for prompt in prompts]
        shared = min([shared_prefix(ids), *(span.start for span in (pooled.spans if pooled else ()))])
        if shared * (len(prompts) - 1) < least_saved(self.model.device):
            shared = 0
        beginning = self._reader.begin(ids[0][:shared] if shared else [])
        rests = [row[shared:] for row in ids]
        batches = self._batches([len(rest) + beginning.read_again for rest in rests], batch_tokens)
        tokens, count = self.student.tokens, self.student.compression_tokens
        for rows in progress(batches, total=len(batches), desc="encode", unit="batch") if show_progress else batches:
            own = pooled.take(rows) if pooled else None
            states = self._reader.read(beginning, [rests[row] for row in rows], tokens, count, own)
            result[rows] = head(states).float().cpu().numpy()
        self._check_finite(result)
        return result

    def _check_finite(self, values: np.ndarray) -> None:
        wrong = int((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))).sum())
        if wrong:
            raise TrainingError(
                f"{wrong} of {len(values)} embeddings are not finite with the backbone in {self.model.dtype}: "
                "take another by --dtype (in Python dtype=), bfloat16 or float32"
            )

    def _batches(self, lengths: Sequence[int], batch_tokens: int | None) -> list[list[int]]:
        """Rows of each forward pass, the longest first."""
        costs = np.array(lengths, dtype=np.int64) + len(self.student.tokens)
        return token_batches(costs, token_budget(batch_tokens, self.model.device.type), padded=self._reader.padded)


def check_texts(texts: Sequence[Any], first: int = 0) -> None:
    """Raises SourceError unless all are strings that a tokenizer can read; `first` numbers the first one."""
    if isinstance(texts, str):
        raise SourceError(f"texts is one string ({texts[:40]!r}): give a list of strings")
    for row, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            shown = " ".join(repr(text).split())[:40]
            raise SourceError(f"texts[{row}] is {shown} ({type(text).__name__}): every text must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"texts[{row}] holds {text[error.start]!r} at character {error.start}, half of a surrogate pair: "
                "read the text as UTF-8 with errors='replace'"
            ) from None
