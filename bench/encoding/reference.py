"""The reference's own encoding, driven from outside; runs in its own environment.

    .bench/reference-env/bin/python -m bench.encoding.reference --work DIR --dtype bf16 --device cpu

The checkpoint is written and loaded by its own classes. Two ways, both in batches of 32 (`encode` itself takes whatever
it is given as one batch):

    given    `encode` on the texts in the order given
    sorted   the wrapper of its `scripts/mteb_eval.py`, which sorts by characters first
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llm2vec_gen import LLM2VecGenModel, models  # type: ignore[import-not-found]
from safetensors.torch import load_file

from bench.encoding.child import BATCH, serve
from bench.reference.model import build_model
from bench.reference.scripts import script
from bench.reference.serving import DTYPES

UNUSED_IMPORTS = ("mteb", "mteb.encoder_interface")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
TASK = "bench"


class Reference:
    """Its model, read from its own format."""

    def __init__(self, settings: argparse.Namespace) -> None:
        """Args: settings: of the child process; the workspace holds backbone, tokenizer and student."""
        with tempfile.TemporaryDirectory(prefix="reference-") as folder:
            write_checkpoint(settings.work, Path(folder), DTYPES[settings.dtype])
            loaded = LLM2VecGenModel.from_pretrained(folder)
        self._model = LLM2VecGenModel(loaded.model, loaded.tokenizer, settings.device)
        self._evaluation = script(settings.work / "reference-source", "mteb_eval", UNUSED_IMPORTS)

    def encode(self, texts: list[str], instruction: str, way: str) -> "np.ndarray[Any, Any]":
        """See `Side.encode`."""
        return {"given": self._in_given_order, "sorted": self._as_evaluated}[way](texts, instruction)

    def _in_given_order(self, texts: list[str], instruction: str) -> "np.ndarray[Any, Any]":
        inputs = [f"{instruction} {text}" if instruction else text for text in texts]
        found = [self._model.encode(inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
        return np.asarray(torch.cat(found).float().cpu().numpy())

    def _as_evaluated(self, texts: list[str], instruction: str) -> "np.ndarray[Any, Any]":
        wrapper = self._evaluation.ModelWrapper(self._model, {TASK: instruction})
        return np.asarray(wrapper.encode(texts, task_name=TASK, batch_size=BATCH).numpy())


def write_checkpoint(work: Path, folder: Path, dtype: torch.dtype) -> None:
    """Our weights in the reference's format, by its own `save_pretrained`."""
    student = load_file(work / "student.safetensors")
    tokens = [f"<|embed_{number}|>" for number in range(len(student["tokens"]))]
    build_model(models, (work / "backbone").resolve(), student, dtype).save_pretrained(folder)
    described = json.loads((work / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer" / "tokenizer.json"),
        padding_side="left",
        **{name: described[name] for name in SPECIAL if name in described},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(folder)
    run = {
        "model_name_or_path": str((work / "backbone").resolve()),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "special_tokens": tokens,
        "encoding_mode": f"last_{len(tokens)}_tokens",
    }
    # JSON is YAML.
    (folder / "run_config.yml").write_text(json.dumps(run), encoding="utf-8")


if __name__ == "__main__":
    serve(Reference)
