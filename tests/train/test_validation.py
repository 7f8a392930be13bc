"""Held-out scores during training, and keeping the best student."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipeline.core.errors import TrainingError
from pipeline.train.params import HeldoutParams
from pipeline.train.trainer import Trainer
from pipeline.train.validation import HeldoutScores, Validation, heldout_scores
from tests.train.test_trainer import make_trainer, some_rows

ONE_BY_ONE = [([row], 1.0) for row in range(12)]
ALONE = Accelerator(cpu=True)


def test_scores_by_hand() -> None:
    """A student whose embeddings are the targets; the reconstruction is the mean over all response tokens."""
    trainer = make_trainer()
    rows, student = trainer.rows, trainer.student
    torch.nn.init.zeros_(student.alignment.weight)
    scores = heldout_scores(rows, ONE_BY_ONE, student, trainer.passes, ALONE)
    assert scores.top1 in (0.0, 1 / 12)  # all embeddings are alike
    with torch.no_grad():
        hidden = trainer.passes.query_pass(rows.query_ids, student.tokens, student.compression_tokens)
        loss, tokens = trainer.passes.response_pass(student.soft_prompts(hidden), rows.response_ids)
    assert scores.recon == pytest.approx(float(loss) / tokens, rel=1e-5)
    # A pass of weight 0 only keeps other processes company.
    together = heldout_scores(rows, [(list(range(12)), 1.0), ([3, 4], 0.0)], student, trainer.passes, ALONE)
    assert vars(together) == pytest.approx(vars(scores), rel=1e-4)


def test_lower_reconstruction_is_better_higher_of_the_others() -> None:
    one, two = HeldoutScores(0.5, 0.5, 0.5, 2.0), HeldoutScores(0.6, 0.6, 0.6, 3.0)
    assert [two.better(one, score) for score in ("cosine", "top1", "mrr", "recon")] == [True, True, True, False]
    assert not one.better(one, "recon")


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_scored_before_the_first_step_and_after_the_last(every: int | None, steps: list[int]) -> None:
    trainer = make_trainer(heldout_rows=some_rows(6), stop_after_steps=5, heldout=HeldoutParams(every=every))
    trainer.run()
    assert trainer.validation is not None
    assert [row["step"] for row in trainer.validation.curve] == steps
    assert trainer.validation.best is None


def selecting(checkpoint: Path, steps: int = 10) -> Trainer:
    """Trains and scores on the same rows, so it gets better; from step 6 on the rate ruins it."""
    trainer = make_trainer(
        heldout_rows=some_rows(),
        checkpoint=checkpoint,
        epochs=6,
        warmup_steps=0,
        schedule_steps=10,
        stop_after_steps=steps,
        checkpoint_every=1,
        heldout=HeldoutParams(every=1, select="cosine"),
    )
    update = trainer.optimizer.step

    def ruinous() -> None:
        if len(trainer.curve) >= 5:
            trainer.optimizer.param_groups[0]["lr"] = 100.0
        update()

    trainer.optimizer.step = ruinous  # type: ignore[method-assign]
    return trainer


def test_the_best_student_is_kept_also_over_a_resume(tmp_path: Path) -> None:
    whole = selecting(tmp_path / "whole")
    whole.run()
    assert whole.validation is not None
    curve, best = whole.validation.curve, whole.validation.best
    assert best is not None
    assert 0 < best.step <= 5
    assert best.scores.cosine == max(row["cosine"] for row in curve) > curve[-1]["cosine"]
    scores = heldout_scores(whole.rows, ONE_BY_ONE, whole.student, whole.passes, ALONE)
    assert scores.cosine == pytest.approx(best.scores.cosine)

    selecting(tmp_path / "cut", steps=7).run()
    resumed = selecting(tmp_path / "cut")
    assert resumed.resume()
    resumed.run()
    assert all(torch.equal(value, resumed.trained[name]) for name, value in whole.trained.items())
    assert resumed.validation is not None
    assert json.dumps(resumed.validation.state()) == json.dumps(whole.validation.state())


def test_selecting_without_heldout_rows() -> None:
    with pytest.raises(TrainingError, match=r"heldout\.select: .* heldout_fraction"):
        make_trainer(heldout=HeldoutParams(select="mrr"))


def test_validation_without_a_selection_restores_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    Validation(some_rows(2)).restore_best({"x": parameter})
    assert parameter.tolist() == [1.0, 1.0]
