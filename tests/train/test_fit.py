"""How many rows run at a time where memory is full: passes are halved until the costliest step fits."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pipeline.core.errors import TrainingError
from pipeline.train.fit import PassLimits, Trial, halve_until_fit
from pipeline.train.trainer import Trainer
from tests.train.test_trainer import make_trainer, some_rows, weights


class FullAbove:
    """A response pass on a device that has room for so many rows."""

    padded = True

    def __init__(self, trainer: Trainer, rows: int) -> None:
        self._pass, self._rows = trainer.passes.response_pass, rows
        self.asked: list[list[list[int]]] = []
        trainer.passes.response_pass = self

    def __call__(self, soft_prompts: torch.Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        self.asked.append([list(ids) for ids in response_ids])
        if len(response_ids) > self._rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._pass(soft_prompts, response_ids)


class Other:
    """An accelerator on another device than the CPU, with `processes` of which another is full the first times."""

    def __init__(self, device: Any, processes: int = 1, full: int = 0) -> None:
        self._real, self._full = Accelerator(cpu=True), full
        self.device, self.num_processes = device, processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        self._full -= 1
        return tensor + 1 if self._full >= 0 else tensor


def test_passes_are_halved_until_the_costliest_step_fits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = make_trainer(some_rows(24), batch_size=12, micro_batch_size="auto")
    before = weights(trainer)
    full = FullAbove(trainer, 3)
    trainer.fit()
    assert trainer.limits == PassLimits(3)
    [line] = [record.getMessage() for record in caplog.records]
    assert "at most 3 rows" in line and "12 rows do not fit" in line and "2.00 GiB" in line
    # 12 rows, 6 rows, then four passes of 3: those of the step whose longest responses are the longest.
    assert [len(rows) for rows in full.asked] == [12, 6, 3, 3, 3, 3]
    longest = max(map(len, trainer.rows.response_ids))
    assert max(map(len, full.asked[2])) == longest
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.trained.values())
    assert not trainer.optimizer.state


def test_what_fits_trains_as_before() -> None:
    whole, full = (make_trainer(batch_size=12, micro_batch_size="auto", stop_after_steps=3) for _ in range(2))
    whole.run()
    FullAbove(full, 2)
    full.fit()
    full.run()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(full)[name], value, atol=1e-5, rtol=1e-4)


def test_a_budget_of_tokens_is_halved_from_what_the_largest_pass_has() -> None:
    trainer = make_trainer(batch_size=12, max_tokens_per_batch=10**6)
    FullAbove(trainer, 5)
    trainer.fit()
    tokens = int(trainer.lengths.sum())
    assert trainer.limits.most_tokens is not None
    assert trainer.limits.most_tokens in (tokens // 2, tokens // 2 // 2)
    assert max(len(rows) for [rows], _ in trainer._groups(list(range(12)))) <= 5


def test_a_row_that_does_not_fit_alone_names_what_would_help() -> None:
    trainer = make_trainer(batch_size=12, micro_batch_size=5)
    full = FullAbove(trainer, 0)
    with pytest.raises(TrainingError, match=r"one row.*out of memory.*checkpoint_responses.*max_response_tokens"):
        trainer.fit()
    assert [len(rows) for rows in full.asked] == [5, 2, 1]


def test_another_fault_is_not_taken_for_a_lack_of_memory() -> None:
    def broken() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        halve_until_fit(PassLimits(4), lambda _: Trial(4, 40, broken), Accelerator(cpu=True))


def test_processes_agree_on_the_smallest() -> None:
    """This process has room; another is full twice."""
    tried = []

    def trial(limits: PassLimits) -> Trial:
        tried.append(limits.most_rows)
        return Trial(limits.most_rows, 99, lambda: None)

    assert halve_until_fit(PassLimits(16), trial, Other(torch.device("cpu"), processes=2, full=2)) == PassLimits(4)
    assert tried == [16, 8, 4]


def test_on_a_gpu_a_run_begins_with_a_trial(tmp_path: Path) -> None:
    trainer = make_trainer(
        checkpoint=tmp_path / "checkpoint", heldout_rows=some_rows(6), micro_batch_size="auto", stop_after_steps=2
    )
    trainer.accelerator = Other(type("Device", (), {"type": "cuda"}))
    FullAbove(trainer, 2)
    trainer.run()
    assert (trainer.limits, len(trainer.curve)) == (PassLimits(2), 2)
    # A run that goes on elsewhere, with more room, keeps the batches of the optimiser.
    resumed = make_trainer(checkpoint=tmp_path / "checkpoint", heldout_rows=some_rows(6), stop_after_steps=2)
    assert resumed.resume()


def test_auto_is_a_process_s_share_of_a_step_and_on_a_cpu_at_most_sixteen_rows() -> None:
    for batch_size, rows in ((4, 4), (64, 16)):
        assert make_trainer(batch_size=batch_size, micro_batch_size="auto").limits == PassLimits(rows)
    params = make_trainer(batch_size=64, micro_batch_size="auto").params
    assert [params.pass_rows(processes) for processes in (1, 3)] == [64, 22]
