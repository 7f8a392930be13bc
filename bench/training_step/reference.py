"""The reference implementation's own training step, driven from outside; runs in its own environment.

    .bench/reference-env/bin/python -m bench.training_step.reference --work DIR --dtype bf16 --device cpu

Models, collation format, loss, `training_step` and settings are the reference's: a trained copy of the backbone with
gradient checkpointing, a frozen copy as decoder, and a teacher that is run in each step. The teacher stands in for an
LLM2Vec encoder of the backbone: the backbone itself under an adapter of the published shape (LoRA of rank 16 on all
projections, in bfloat16, mean over the answer). Flash-attention is replaced by SDPA. With `--variant exact` the teacher
has the student's precision, so that targets do not differ between precisions.
"""

import argparse
import tempfile
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from bench.reference.model import build_model, trained
from bench.reference.scripts import script
from bench.reference.serving import DTYPES
from bench.training_step.child import Arrays, serve
from bench.training_step.workload import Rows

UNUSED_IMPORTS = ("datasets", "hydra", "omegaconf")
TEACHER_RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Reference:
    """Its model and trainer around our weights."""

    def __init__(self, settings: argparse.Namespace) -> None:
        """Args: settings: of the child process; the workspace holds the backbone, the student and the batches."""
        train = script(settings.work / "reference-source", "train", UNUSED_IMPORTS)
        self._backbone, self._device = settings.work / "backbone", settings.device
        self._student = load_file(settings.work / "student.safetensors")
        self._dtype, self._exact = DTYPES[settings.dtype], settings.variant == "exact"
        self._model = self._build(train)
        self._trainer = self._build_trainer(train)
        self._teacher_embeddings = train.get_teacher_embeddings
        self._optimizer = self._trainer.create_optimizer()

    def step(self, index: int, rows: Rows) -> float:
        """See `Side.step`."""
        loss = self._forward_backward(rows)
        parameters = list(trained(self._model).values())
        self._trainer.accelerator.clip_grad_norm_(parameters, self._trainer.args.max_grad_norm)
        self._optimizer.step()
        self._model.zero_grad()
        return loss

    def gradients(self, index: int, rows: Rows) -> tuple[float, Arrays]:
        """See `Side.gradients`."""
        loss = self._forward_backward(rows)
        return loss, {name: parameter.grad.cpu().numpy() for name, parameter in trained(self._model).items()}

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

    def _build(self, train: ModuleType) -> Any:
        model = build_model(train, self._backbone, self._student, self._dtype)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _build_trainer(self, train: ModuleType) -> Any:
        settings = train.CustomTrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="reference-"),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=5e-4,
            report_to=[],
            use_cpu=self._device == "cpu",
        )
        trainer = train.LLM2VecGenTrainer(
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
