"""A trained encoder in use: texts in, embeddings or soft prompts out, one forward pass, nothing generated."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.artifacts import digest_of, file_sha256
from pipeline.backbone import (
    BackboneParams,
    DType,
    PromptFormatter,
    Quantize,
    eos_token_id,
    identify,
    load_backbone,
    load_tokenizer,
)
from pipeline.encoder.batching import micro_batches
from pipeline.encoder.config import EncoderConfig
from pipeline.encoder.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS
from pipeline.encoder.lora import load_adapter
from pipeline.encoder.reader_choice import prompt_reader
from pipeline.encoder.segments import shared_prefix
from pipeline.encoder.student import Student, new_student
from pipeline.errors import TrainingError
from pipeline.params import validate
from pipeline.prompts import join_instruction
from pipeline.runtime import progress

CONFIG_FILE = "encoder_config.json"
WEIGHTS_FILE = "student.safetensors"
ADAPTER = "adapter"

# Tokens of one forward pass by device.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
# A beginning is read by itself where that saves so many tokens at least: a forward pass has its price.
WORTH_SHARING = 64


class Encoder:
    """A frozen backbone with its student.

    Attributes:
        model: the backbone; it still answers as before.
        tokenizer: the backbone's.
        width: dimensions of an embedding.
        max_tokens: longest prompt, new tokens not counted; longer texts lose their end.
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
    ) -> None:
        """From loaded parts; `load` reads them from a folder. `adapted` is the backbone under the adapters that embeds.

        Without adapters the model itself embeds.
        """
        self.model, self.tokenizer, self.student, self.config = model, tokenizer, student.eval(), config
        self.width, self.max_tokens, self.identity = config.width, config.max_query_tokens, identity
        self._reader = prompt_reader(model if adapted is None else adapted)
        self._format = PromptFormatter(tokenizer, config.template, config.max_query_tokens, config.chat_template_kwargs)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str = "cpu",
        dtype: DType = "float32",
        backbone: Any = None,
        quantize: Quantize | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Read an encoder folder.

        Args:
            path: the folder.
            device: of the backbone.
            dtype: of the backbone.
            backbone: the name or a loaded model to use in place of the recorded one. A loaded model is taken as it is:
                whether it is the one the encoder was trained on is the caller's to know.
            quantize: see `load_backbone`.
            trust_remote_code: let the backbone and its tokenizer run code that comes with them. No folder can ask for
                it, only the caller.

        Raises:
            TrainingError: the folder is no encoder, or the backbone is not the one it was trained on.
            BackboneError: the backbone cannot be loaded.
        """
        config = read_config(path)
        if backbone is None or isinstance(backbone, str):
            params = BackboneParams(
                name=backbone or config.backbone["name"],
                revision=config.backbone.get("revision"),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
            check_backbone(config, params)
            backbone = load_backbone(params, device, quantize)
        student = Student(config.hidden, config.width, config.compression_tokens, config.thought_tokens)
        student.load_state_dict(load_file(path / WEIGHTS_FILE))
        adapted = load_adapter(backbone, path / ADAPTER, config.lora) if config.lora else None
        tokenizer = load_tokenizer(BackboneParams(name=str(path), trust_remote_code=trust_remote_code))
        return cls(backbone, tokenizer, student.to(backbone.device), config, _identity(path, config), adapted)

    def untrained(self, seed: int) -> "Encoder":
        """The backbone itself, without adapters, with a student that no step has trained: random projections."""
        student = new_student(
            self.model,
            self.width,
            compression_tokens=self.config.compression_tokens,
            thought_tokens=self.config.thought_tokens,
            seed=seed,
        )
        identity = {"name": "untrained", "seed": seed, "backbone": self.config.backbone}
        return Encoder(self.model, self.tokenizer, student, self.config, identity)

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings float32 `[len(texts), width]`, not normalised: compare them by cosine.

        Args:
            texts: any strings; each is cut to `max_tokens` prompt tokens.
            instruction: put before each text, e.g. "Generate a passage that best answers this question:".
            batch_tokens: most tokens in one forward pass, new tokens included; texts of like length are put together,
                one that is longer by itself has a pass of its own. None: `BATCH_TOKENS` of the device.
            show_progress: show a bar.
        """
        prompts = self._prompts(texts, instruction)
        return self._batched(prompts, batch_tokens, self.student.embedding, (self.width,), show_progress)

    def soft_prompts(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None
    ) -> np.ndarray:
        """Soft prompts float32 `[len(texts), n, d]`: what the backbone decodes into an answer. See `encode`."""
        shape = (self.config.compression_tokens, self.config.hidden)
        return self._batched(self._prompts(texts, instruction), batch_tokens, lambda soft: soft, shape)

    def hidden_states(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None
    ) -> np.ndarray:
        """Final-normed hidden states float32 `[len(texts), n, d]` at the compression tokens. See `encode`."""
        shape = (self.config.compression_tokens, self.config.hidden)
        return self._batched(self._prompts(texts, instruction), batch_tokens, None, shape)

    def _prompts(self, texts: Sequence[str], instruction: str) -> list[list[int]]:
        # Without a template and a start token an empty text has no token at all; EOS stands for it.
        empty = [eos_token_id(self.tokenizer)]
        prompts = self._format.batch([join_instruction(instruction, text) for text in texts])
        return [prompt.token_ids or empty for prompt in prompts]

    @torch.inference_mode()
    def _batched(
        self,
        prompts: Sequence[list[int]],
        batch_tokens: int | None,
        head: Callable[[Tensor], Tensor] | None,
        shape: tuple[int, ...],
        show_progress: bool = False,
    ) -> np.ndarray:
        result = np.empty((len(prompts), *shape), dtype=np.float32)
        shared = shared_prefix(prompts)
        if shared * (len(prompts) - 1) < WORTH_SHARING:
            shared = 0
        beginning = self._reader.begin(prompts[0][:shared] if shared else [])
        rests = [ids[shared:] for ids in prompts]
        batches = self._batches([len(ids) + beginning.read_again for ids in rests], batch_tokens)
        for rows in progress(batches, total=len(batches), desc="encode", unit="batch") if show_progress else batches:
            hidden = self._reader.read(
                beginning, [rests[row] for row in rows], self.student.tokens, self.student.compression_tokens
            )
            values = hidden if head is None else head(self.student.soft_prompts(hidden))
            result[rows] = values.float().cpu().numpy()
        return result

    def _batches(self, lengths: Sequence[int], batch_tokens: int | None) -> list[list[int]]:
        """Rows of each forward pass, the longest first, so that too large a batch shows at once."""
        costs = np.array(lengths, dtype=np.int64) + len(self.student.tokens)
        order = [int(row) for row in np.argsort(-costs, kind="stable")]
        return micro_batches(
            order,
            costs,
            most_rows=len(order),
            most_tokens=batch_tokens or BATCH_TOKENS.get(self.model.device.type, BATCH_TOKENS["cuda"]),
            padded=self._reader.padded,
        )


def read_config(path: Path) -> EncoderConfig:
    """The config of an encoder folder.

    Raises:
        TrainingError: the folder holds none.
    """
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"{path} is not an encoder (no {CONFIG_FILE}): run the train stage first") from None
    return validate(content, EncoderConfig, where=str(path / CONFIG_FILE))


def _identity(path: Path, config: EncoderConfig) -> dict[str, Any]:
    trained = file_sha256(path / WEIGHTS_FILE)
    if config.lora is not None:
        trained = digest_of([trained, file_sha256(path / ADAPTER / ADAPTER_WEIGHTS)])
    return {"name": path.name, "sha256": trained}


def check_backbone(config: EncoderConfig, params: BackboneParams) -> None:
    """Raises TrainingError if the backbone has not the weights that the encoder was trained on, where it says which."""
    expected = config.backbone.get("sha256")
    if expected is None:
        return
    found = identify(params.name, params.revision).get("sha256")
    if found != expected:
        raise TrainingError(
            f"backbone {params.name} has sha256 {str(found)[:12]}..., the encoder was trained on {expected[:12]}...: "
            "give the folder it was trained on, or train again"
        )
