"""The loop: schedule, learning, micro-batches, resume, stop."""

import math
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.core.errors import TrainingError
from pipeline.encoder.passes.plain import plain_passes
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import new_student
from pipeline.train.data import TrainingRows
from pipeline.train.losses import loss_sums
from pipeline.train.params import TrainParams, WarmStartParams
from pipeline.train.trainer import Trainer
from pipeline.train.validation import Validation
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
    ids = [f"row{row}" for row in range(count)]
    return TrainingRows(ids, query_ids, response_ids, generator.normal(size=(count, width)).astype(np.float32))


def make_trainer(
    rows: TrainingRows | None = None,
    checkpoint: Path | None = None,
    heldout_rows: TrainingRows | None = None,
    **changes: Any,
) -> Trainer:
    params = TrainParams(**{**PARAMS, **changes})
    rows = rows or some_rows()
    backbone = tiny_model()
    student = new_student(
        backbone, rows.width, compression_tokens=params.compression_tokens, thought_tokens=params.thought_tokens, seed=0
    )
    validation = None
    if heldout_rows is not None:
        validation = Validation(heldout_rows, params.heldout.select)
    return Trainer(
        student, plain_passes(backbone), rows, params, Accelerator(cpu=True), validation, checkpoint=checkpoint
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.student.state_dict().items()}


def test_both_losses_fall() -> None:
    trainer = make_trainer(epochs=25)
    trainer.run()
    first, last = trainer.curve[0], trainer.curve[-1]
    assert last["align"] < 0.5 * first["align"]
    assert last["recon"] < first["recon"]


def test_reconstruction_alone_learns_what_all_responses_share() -> None:
    rows = some_rows()
    rows = TrainingRows(rows.ids, rows.query_ids, [[9, 9, 9, 2]] * len(rows), rows.targets)
    trainer = make_trainer(rows, epochs=60, align_weight=0.0, learning_rate=0.1, max_grad_norm=100.0)
    trainer.run()
    assert trainer.curve[-1]["recon"] < trainer.curve[0]["recon"] - 0.2


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"max_tokens_per_batch": 1}, {"max_tokens_per_batch": 40}],
)
def test_micro_batches_change_nothing(changes: dict[str, int]) -> None:
    """Responses differ in length: the mean over a step's tokens must not become a mean of means."""
    whole, split = make_trainer(stop_after_steps=3), make_trainer(stop_after_steps=3, **changes)
    whole.run()
    split.run()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, atol=1e-5, rtol=1e-4)
    assert [row["loss"] for row in split.curve] == pytest.approx([row["loss"] for row in whole.curve], rel=1e-5)


class CountedQueryPass:
    """A query pass that notes how many rows it read each time."""

    padded = False

    def __init__(self, trainer: Trainer) -> None:
        self._pass = trainer.passes.query_pass
        self.rows: list[int] = []
        trainer.passes.query_pass = self

    def __call__(self, query_ids: Any, tokens: torch.Tensor, read: int, pooled: Any = None) -> torch.Tensor:
        self.rows.append(len(query_ids))
        return self._pass(query_ids, tokens, read, pooled)


@pytest.mark.parametrize("share", [0.0, 1.2, 100.0])
def test_a_query_pass_for_several_response_passes_changes_nothing(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, so that only rounding of the last digits is left: gradients of one row at a time, and of groups."""
    monkeypatch.setattr("pipeline.train.trainer._QUERY_SHARE", share)
    gradients, read = [], []
    for together in (False, True):
        trainer = make_trainer(batch_size=12, micro_batch_size=2)
        trainer.passes = make_passes(tiny_model().double())
        assert trainer.passes.queries_together
        trainer.passes.queries_together = together
        trainer.student.double()
        counted = CountedQueryPass(trainer)
        totals = trainer._accumulate(list(range(12)))
        gradients.append([parameter.grad for parameter in trainer.trained.values()] + [totals])
        read.append(counted.rows)
    assert read[0] == [2] * 6
    assert sum(read[1]) == 12
    assert (len(read[1]) == 6, len(read[1]) == 1) == (share == 0.0, share == 100.0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-13)


def test_the_reconstruction_loss_is_a_mean_over_tokens_of_the_step() -> None:
    trainer = make_trainer(stop_after_steps=1, batch_size=12, micro_batch_size=5)
    trainer.run()
    batch = make_trainer().rows.batch(range(12))
    fresh = make_trainer()
    with torch.no_grad():
        sums = [loss_sums(fresh.student, fresh.passes, fresh.rows.batch([row]), "sum") for row in range(12)]
    assert trainer.curve[0]["recon"] == pytest.approx(sum(float(one.recon) for one in sums) / batch.response_tokens)
    assert trainer.curve[0]["align"] == pytest.approx(sum(float(one.align) for one in sums) / 12)


def test_the_alignment_alone_runs_no_response_pass() -> None:
    trainer = make_trainer(stop_after_steps=2, recon_weight=0.0)
    trainer.passes.response_pass = None  # type: ignore[assignment]
    trainer.run()
    assert math.isnan(trainer.curve[-1]["recon"])
    assert trainer.curve[-1]["loss"] == trainer.curve[-1]["align"]


@pytest.mark.parametrize(("compression", "thought"), [(1, 0), (1, 20), (100, 0), (100, 20)])
def test_numbers_of_tokens(compression: int, thought: int) -> None:
    trainer = make_trainer(stop_after_steps=1, compression_tokens=compression, thought_tokens=thought)
    trainer.run()
    assert len(trainer.student.tokens) == compression + thought
    assert math.isfinite(trainer.curve[0]["loss"])


def test_backbone_stays_frozen() -> None:
    trainer = make_trainer(stop_after_steps=2)
    before = {name: value.clone() for name, value in trainer.passes.query_pass._lm.state_dict().items()}
    trainer.run()
    assert all(torch.equal(before[name], value) for name, value in trainer.passes.query_pass._lm.state_dict().items())


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = make_trainer(schedule_steps=12)
    whole.run()
    first = make_trainer(checkpoint=tmp_path / "checkpoint", schedule_steps=12, stop_after_steps=5)
    first.run()
    first.save()
    second = make_trainer(checkpoint=tmp_path / "checkpoint", schedule_steps=12)
    assert second.resume()
    assert len(second.curve) == 5
    second.run()
    assert second.curve == whole.curve
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


def test_a_longer_run_goes_on_where_the_schedule_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    make_trainer(checkpoint=path, schedule_steps=20, stop_after_steps=6).run()
    assert make_trainer(checkpoint=path, schedule_steps=20, stop_after_steps=8, epochs=9).resume()


def test_a_shorter_run_leaves_the_longer_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    make_trainer(checkpoint=path, schedule_steps=20, stop_after_steps=6).run()
    kept = path.read_bytes()
    with pytest.raises(TrainingError, match=r"stop_after_steps: .* has 6 steps, .* ask for 4"):
        make_trainer(checkpoint=path, schedule_steps=20, stop_after_steps=4).resume()
    assert path.read_bytes() == kept


def test_the_start_is_kept_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(checkpoint=tmp_path / "checkpoint")
    torch.nn.init.normal_(trainer.student.reconstruction.weight)  # as a closed-form start would
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    resumed = make_trainer(checkpoint=tmp_path / "checkpoint")
    assert resumed.resume()
    assert torch.equal(resumed.student.reconstruction.weight, trainer.student.reconstruction.weight)
    resumed.run()
    assert len(resumed.curve) == resumed.total


def test_damaged_checkpoint_starts_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint"
    trainer = make_trainer(checkpoint=path, stop_after_steps=3)
    trainer.run()
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert not make_trainer(checkpoint=path).resume()
    assert "damaged" in caplog.text


def test_a_checkpoint_of_other_params_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    make_trainer(checkpoint=path, stop_after_steps=3).run()
    with pytest.raises(TrainingError, match=r"weight_decay: 0\.1 here, 0\.0 in the checkpoint"):
        make_trainer(checkpoint=path, stop_after_steps=3, weight_decay=0.1).resume()


def test_a_checkpoint_goes_on_with_smaller_forward_passes(tmp_path: Path) -> None:
    """What a user changes who ran out of memory at step 3000."""
    path = tmp_path / "checkpoint"
    make_trainer(checkpoint=path, stop_after_steps=3).run()
    resumed = make_trainer(checkpoint=path, stop_after_steps=3, micro_batch_size=1, max_tokens_per_batch=20)
    assert resumed.resume()


def test_a_checkpoint_goes_on_in_the_same_order_through_other_passes(tmp_path: Path) -> None:
    """Padded passes sort by length, packed ones do not: rows would be lost and others repeated."""
    path, rows = tmp_path / "checkpoint", some_rows(40)
    first = make_trainer(rows, path, stop_after_steps=3, schedule_steps=10, batch_size=4)
    order = list(first._steps())
    first.run()
    second = make_trainer(rows, path, stop_after_steps=10, schedule_steps=10, batch_size=4)
    second.passes = make_passes(tiny_model())
    assert second.passes.padded != first.passes.padded
    assert second.resume()
    steps = list(second._steps())
    assert steps[:3] == order
    assert sorted(row for step in steps for row in step) == list(range(40))


def test_gradients_of_a_large_batch_survive_float16() -> None:
    """The mean over 20,000 tokens makes each share smaller than float16 can hold (cosine .997 without a scale)."""
    generator = np.random.default_rng(0)
    responses = generator.integers(3, 250, (512, 40)).tolist()
    rows = TrainingRows([str(row) for row in range(512)], [[5, 6, 7]] * 512, responses, np.zeros((512, 5), np.float32))
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        trainer = make_trainer(rows, batch_size=512, micro_batch_size=64, align_weight=0.0)
        trainer.passes = plain_passes(tiny_model().to(dtype))
        torch.nn.init.normal_(trainer.student.reconstruction.weight, std=0.1, generator=torch.manual_seed(0))
        trainer._accumulate(list(range(512)))
        gradients[dtype] = trainer.student.tokens.grad.flatten()
    assert torch.cosine_similarity(gradients[torch.float16], gradients[torch.float32], dim=0) > 0.9999
    torch.testing.assert_close(gradients[torch.float16].norm(), gradients[torch.float32].norm(), rtol=0.002, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(checkpoint=tmp_path / "checkpoint", checkpoint_every=1000)
    take_step = trainer._step

    def interrupted(step: int, batch: list[int]) -> None:
        if step == 4:
            os.kill(os.getpid(), number)
        take_step(step, batch)

    monkeypatch.setattr(trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed = make_trainer(checkpoint=tmp_path / "checkpoint")
    assert resumed.resume()
    assert len(resumed.curve) == 5


def test_an_infinite_loss_names_rows_and_learning_rate_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    rows = some_rows()
    rows.targets[5, 2] = np.inf
    trainer = make_trainer(rows, checkpoint=path)
    trainer.save()
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=r"rows whose own loss is not: row5\. .*learning_rate \(0.01\)") as caught:
        trainer.run()
    assert f"the last good checkpoint is {path}" in str(caught.value)
    assert path.read_bytes() == before
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


@pytest.mark.parametrize("every", [1, 100])
def test_a_step_that_is_not_finite_changes_no_weight_though_it_is_read_a_step_later(every: int, tmp_path: Path) -> None:
    rows = some_rows()
    order = list(make_trainer(rows)._steps())
    rows.targets[order[2][0], 0] = np.nan
    good = make_trainer(rows, stop_after_steps=2, schedule_steps=12)
    good.run()
    path = tmp_path / "checkpoint"
    trainer = make_trainer(rows, path, schedule_steps=12, checkpoint_every=every)
    with pytest.raises(TrainingError, match="step 3 is not finite"):
        trainer.run()
    assert all(torch.equal(value, weights(good)[name]) for name, value in weights(trainer).items())
    resumed = make_trainer(rows, path, schedule_steps=12, checkpoint_every=every)
    assert resumed.resume()
    assert len(resumed.curve) == (2 if every == 1 else 0)


def test_the_loss_of_a_step_is_known_a_step_later() -> None:
    trainer = make_trainer(stop_after_steps=4)
    shown = [trainer._take(numbered) for numbered in islice(enumerate(trainer._steps()), 3)]
    trainer.save()
    assert shown == [None, trainer.curve[0]["loss"], trainer.curve[1]["loss"]]
    assert [row["step"] for row in trainer.curve] == [1, 2, 3]


def test_an_infinite_gradient_of_finite_losses_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.student.tokens.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"step 1 is not finite \(.*gradient (nan|inf)\); each row alone is: row"):
        trainer.run()


def test_targets_of_another_width() -> None:
    trainer = make_trainer()
    with pytest.raises(TrainingError, match="targets have 7 dimensions, the student embeds in 5"):
        Trainer(trainer.student, trainer.passes, some_rows(width=7), trainer.params, trainer.accelerator)
