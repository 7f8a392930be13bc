"""The loop: schedule, learning, micro-batches, resume, stop."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.encoder.data import TrainingRows
from pipeline.encoder.passes import PlainPasses
from pipeline.encoder.student import input_embeddings, new_student
from pipeline.errors import TrainingError
from pipeline.training import Trainer, TrainParams, WarmStartParams, planned_steps, rate_factor, warm_start_student
from tests.conftest import tiny_model

PARAMS: dict[str, Any] = dict(
    compression_tokens=2, thought_tokens=1, template="raw", max_query_tokens=64, max_response_tokens=64,
    align_weight=1.0, recon_weight=1.0, align_reduction="sum", warm_start=WarmStartParams(), learning_rate=1e-2,
    weight_decay=0.0, warmup_steps=2, epochs=4, batch_size=4, micro_batch_size=4, max_grad_norm=1.0,
    checkpoint_every=3, seed=0,
)  # fmt: skip


def some_rows(count: int = 12, width: int = 5) -> TrainingRows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 9, (count, 2))
    query_ids = [generator.integers(3, 250, length).tolist() for length in lengths[:, 0]]
    response_ids = [[*generator.integers(3, 250, length).tolist(), 2] for length in lengths[:, 1]]
    return TrainingRows(query_ids, response_ids, generator.normal(size=(count, width)).astype(np.float32))


def make_trainer(rows: TrainingRows | None = None, checkpoint: Path | None = None, **changes: Any) -> Trainer:
    params = TrainParams(**{**PARAMS, **changes})
    rows = rows or some_rows()
    backbone = tiny_model()
    student = new_student(
        backbone, rows.width, compression_tokens=params.compression_tokens, thought_tokens=params.thought_tokens, seed=0
    )
    return Trainer(student, PlainPasses(backbone), rows, params, Accelerator(cpu=True), checkpoint)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.student.state_dict().items()}


def test_rate_rises_linearly_then_falls_to_zero() -> None:
    assert [rate_factor(step, 2, 6) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rate_factor(0, 0, 4) == 1.0


def test_planned_steps() -> None:
    params = TrainParams(**{**PARAMS, "epochs": 2, "batch_size": 5})
    assert planned_steps(12, params) == 6
    assert planned_steps(12, params.model_copy(update={"max_steps": 4})) == 4


def test_both_losses_fall() -> None:
    trainer = make_trainer(epochs=25)
    trainer.run()
    first, last = trainer.curve[0], trainer.curve[-1]
    assert last["align"] < 0.5 * first["align"]
    assert last["recon"] < first["recon"]


def test_reconstruction_alone_learns_what_all_responses_share() -> None:
    rows = some_rows()
    rows = TrainingRows(rows.query_ids, [[9, 9, 9, 2]] * len(rows), rows.targets)
    trainer = make_trainer(rows, epochs=60, align_weight=0.0, learning_rate=0.1, max_grad_norm=100.0)
    trainer.run()
    assert trainer.curve[-1]["recon"] < trainer.curve[0]["recon"] - 0.2


def test_micro_batches_change_nothing() -> None:
    whole, split = make_trainer(max_steps=3), make_trainer(max_steps=3, micro_batch_size=1)
    whole.run()
    split.run()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, atol=1e-5, rtol=1e-4)
    assert [row["loss"] for row in split.curve] == pytest.approx([row["loss"] for row in whole.curve], rel=1e-5)


def test_backbone_stays_frozen() -> None:
    trainer = make_trainer(max_steps=2)
    before = {name: value.clone() for name, value in trainer.passes._lm.state_dict().items()}
    trainer.run()
    assert all(torch.equal(before[name], value) for name, value in trainer.passes._lm.state_dict().items())


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = make_trainer(schedule_steps=12)
    whole.run()
    first = make_trainer(checkpoint=tmp_path / "checkpoint", schedule_steps=12, max_steps=5)
    first.run()
    first.save()
    second = make_trainer(checkpoint=tmp_path / "checkpoint", schedule_steps=12)
    assert second.resume()
    assert len(second.curve) == 5
    second.run()
    assert second.curve == whole.curve
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


def test_damaged_checkpoint_starts_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint"
    trainer = make_trainer(checkpoint=path, max_steps=3)
    trainer.run()
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert not make_trainer(checkpoint=path).resume()
    assert "damaged" in caplog.text


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(checkpoint=tmp_path / "checkpoint", checkpoint_every=1000)
    take_step = trainer._step

    def interrupted(step: int, batch: list[int]) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(step, batch)

    monkeypatch.setattr(trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed = make_trainer(checkpoint=tmp_path / "checkpoint")
    assert resumed.resume()
    assert len(resumed.curve) == 5


def test_infinite_loss_names_the_step_and_the_knob() -> None:
    rows = some_rows()
    rows.targets[:] = np.inf
    with pytest.raises(TrainingError, match=r"step 1 .*train.learning_rate \(0.01\)"):
        make_trainer(rows).run()


def test_warm_start_lowers_the_first_alignment_loss() -> None:
    params = {"align_weight": 1.0, "warm_start": WarmStartParams(enabled=True, ridge=1.0)}
    cold, warm = make_trainer(max_steps=1, **params), make_trainer(max_steps=1, **params)
    words = input_embeddings(warm.passes._lm).numpy()
    warm_start_student(warm.student, warm.passes, warm.rows, warm.params, words, [5, 6, 7])
    cold.run()
    warm.run()
    assert warm.curve[0]["align"] < 0.5 * cold.curve[0]["align"]
