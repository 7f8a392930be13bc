"""The reference implementation's own training step, driven from outside; runs in its own environment.

    .bench/reference-env/bin/python -m bench.training_step.reference --work DIR --dtype bf16 --device cpu

Models, collation format, loss, `training_step` and settings are the reference's: a trained copy of the backbone with
gradient checkpointing, a frozen copy as decoder, and a teacher that is run in each step. The teacher stands in for an
LLM2Vec encoder of the backbone: the backbone itself under an adapter of the published shape (LoRA of rank 16 on all
projections, in bfloat16, mean over the answer). Flash-attention is replaced by SDPA. With `--variant exact` the teacher
has the student's precision, so that targets do not differ between precisions.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from bench.training_step.child import DTYPES, Arrays, serve
from bench.training_step.workload import Rows

UNUSED_IMPORTS = ("datasets", "hydra", "omegaconf")
TEACHER_RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def training_script(path: Path) -> ModuleType:
    """The reference's `scripts/train.py`, imported.

    Its command line and its download of data sets need packages that a step does not; they are empty here, which also
    keeps them out of the memory that is measured.
    """
    spec = importlib.util.spec_from_file_location("reference_training_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    empty = {name: mock.MagicMock() for name in UNUSED_IMPORTS}
    with mock.patch.dict(sys.modules, empty), mock.patch("transformers.utils.versions.require_version"):
        spec.loader.exec_module(module)
    return module


class Reference:
    """Its model and trainer around our weights."""

    def __init__(self, settings: argparse.Namespace) -> None:
        """Args: settings: of the child process; the workspace holds the backbone, the student and the batches."""
        script = training_script(next(settings.work.glob("reference-source/*/scripts/train.py")))
        self._backbone, self._device = settings.work / "backbone", settings.device
        self._student = load_file(settings.work / "student.safetensors")
        self._dtype, self._exact = DTYPES[settings.dtype], settings.variant == "exact"
        self._model = self._build(script)
        self._trainer = self._build_trainer(script)
        self._teacher_embeddings = script.get_teacher_embeddings
        self._optimizer = self._trainer.create_optimizer()

    def step(self, index: int, rows: Rows) -> float:
        """See `Side.step`."""
        loss = self._forward_backward(rows)
        parameters = list(self._trained().values())
        self._trainer.accelerator.clip_grad_norm_(parameters, self._trainer.args.max_grad_norm)
        self._optimizer.step()
        self._model.zero_grad()
        return loss

    def gradients(self, index: int, rows: Rows) -> tuple[float, Arrays]:
        """See `Side.gradients`."""
        loss = self._forward_backward(rows)
        return loss, {name: parameter.grad.cpu().numpy() for name, parameter in self._trained().items()}

    def targets(self, rows: Rows) -> "np.ndarray[Any, Any]":
        """See `Side.targets`; as the step itself computes them."""
        inputs = self._inputs(rows)
        like = torch.zeros((), dtype=self._dtype, device=self._device)
        ids, mask = inputs["teacher_answer_input_ids"], inputs["teacher_answer_attention_mask"]
        found = self._teacher_embeddings(ids, mask, self._trainer.teacher_model, student_encoder_states=like)
        return np.asarray(found.double().cpu().numpy())

    def _forward_backward(self, rows: Rows) -> float:
        return float(self._trainer.training_step(self._model, self._inputs(rows)))

    def _inputs(self, rows: Rows) -> dict[str, Tensor]:
        new = self._model.config.special_tokens_ids
        queries, query_mask = _pad([[*ids, *new] for ids in rows.query_ids])
        answers, answer_mask = _pad(rows.response_ids)
        judged, judged_mask = _pad([ids[:-1] for ids in rows.response_ids])
        inputs = {
            "query_input_ids": queries,
            "query_attention_mask": query_mask,
            "answer_input_ids": answers,
            "answer_attention_mask": answer_mask,
            "labels": answers.masked_fill(answer_mask == 0, -100),
            "teacher_answer_input_ids": judged,
            "teacher_answer_attention_mask": judged_mask,
            # Read, and left unused at these weights, in each step.
            "repeat_answer_input_ids": answers,
            "repeat_answer_attention_mask": answer_mask,
        }
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _trained(self) -> dict[str, Any]:
        model = self._model
        (tokens,) = [p for name, p in model.encoder_model.named_parameters() if "trainable_tokens_delta" in name]
        reconstruction, alignment = model.reconstruction_mlp.projection, model.alignment_mlp.projection
        return {
            "tokens": tokens,
            "reconstruction.weight": reconstruction.weight,
            "reconstruction.bias": reconstruction.bias,
            "alignment.weight": alignment.weight,
            "alignment.bias": alignment.bias,
        }

    def _build(self, script: ModuleType) -> Any:
        config = transformers.AutoConfig.from_pretrained(self._backbone)
        tokens, width = self._student["tokens"], self._student["alignment.weight"].shape[0]
        config.num_special_tokens = len(tokens)
        config.special_tokens_ids = list(range(config.vocab_size, config.vocab_size + len(tokens)))
        encoder = transformers.AutoModel.from_pretrained(self._backbone, config=config, torch_dtype=self._dtype)
        encoder.resize_token_embeddings(config.vocab_size + len(tokens))
        encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=config.special_tokens_ids))
        decoder = transformers.AutoModelForCausalLM.from_pretrained(
            self._backbone, config=config, torch_dtype=self._dtype
        ).requires_grad_(False)
        model = script.EncoderDecoderModel(
            encoder_model=encoder,
            decoder_model=decoder,
            encoding_mode=f"last_{len(tokens)}_tokens",
            reconstruction_mlp=script.ProjectionModel(config.hidden_size, config.hidden_size, dtype=self._dtype),
            alignment_mlp=script.ProjectionModel(config.hidden_size, width, dtype=self._dtype),
        )
        self._model = model
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(self._student[name])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _build_trainer(self, script: ModuleType) -> Any:
        settings = script.CustomTrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="reference-"),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=5e-4,
            report_to=[],
            use_cpu=self._device == "cpu",
        )
        trainer = script.LLM2VecGenTrainer(
            model=self._model,
            teacher_model=self._teacher(),
            args=settings,
            recon_loss_weight=1.0,
            align_loss_weight=1.0,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    def _teacher(self) -> PeftModel:
        dtype = self._dtype if self._exact else torch.bfloat16
        base = transformers.AutoModel.from_pretrained(self._backbone, torch_dtype=dtype)
        adapter = LoraConfig(r=TEACHER_RANK, lora_alpha=2 * TEACHER_RANK, target_modules=PROJECTIONS)
        return get_peft_model(base, adapter).eval().requires_grad_(False)


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


if __name__ == "__main__":
    serve(Reference)
