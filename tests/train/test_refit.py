"""The alignment fitted again after the last step, against ridge regression written out, and what it leaves as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.optim.batching import epoch_order
from pipeline.train.params import HeldoutParams, RefineParams, WarmStartParams
from pipeline.train.reading import row_statistics
from pipeline.train.refine import refine_alignment
from pipeline.train.refit import refit_alignment
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import STRENGTHS
from tests.train.test_trainer import make_trainer, some_rows, weights


def ridge(features: np.ndarray, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias for features of which each is divided by its deviation."""
    mean, deviation = features.mean(0), features.std(0)
    inputs = (features - mean) / deviation
    found = np.linalg.solve(inputs.T @ inputs + strength * np.eye(len(mean)), inputs.T @ (targets - targets.mean(0)))
    weight = found.T / deviation
    return weight, targets.mean(0) - weight @ mean


def soft_prompts(trainer: Trainer, rows: np.ndarray) -> np.ndarray:
    """Their means over the compression tokens `[N, d]`, float64."""
    student = trainer.student
    with torch.no_grad():
        queries = [trainer.rows.query_ids[row] for row in rows]
        states = trainer.passes.query_pass(queries, student.tokens, student.compression_tokens)
        return student.soft_prompts(states).double().mean(1).numpy()


@pytest.mark.parametrize("start", [{"enabled": False, "ridge": 3.0}, {"enabled": True, "ridge": 30.0, "rows": 7}])
def test_it_is_ridge_regression_over_what_was_trained(start: dict[str, float]) -> None:
    trainer = make_trainer(heldout_rows=some_rows(6), stop_after_steps=5, warm_start=WarmStartParams(**start))
    trainer.run()
    before = weights(trainer)
    refit_alignment(trainer)
    after = weights(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "alignment.weight",
        "alignment.bias",
    ]
    rows = np.sort(epoch_order(12, 0, 0)[: start.get("rows")])
    weight, bias = ridge(soft_prompts(trainer, rows), trainer.rows.targets[rows].astype(np.float64), start["ridge"])
    np.testing.assert_allclose(after["alignment.weight"], weight, rtol=1e-3, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(after["alignment.bias"], bias, rtol=1e-3, atol=1e-3)
    assert trainer.facts["refit_ridge"] == start["ridge"]


def test_its_strength_is_chosen_and_its_scores_are_a_fact_beside_the_curve() -> None:
    """Held-out rows that are trained on: the closed form is nearer to their targets than five steps."""
    trainer = make_trainer(heldout_rows=some_rows(), stop_after_steps=5)
    trainer.run()
    refit_alignment(trainer)
    assert trainer.facts["refit_ridge"] in STRENGTHS
    assert trainer.validation is not None
    first, last = trainer.validation.curve
    found = trainer.facts["heldout_refitted"]
    assert found["step"] == last["step"] == 5
    assert found["cosine"] > last["cosine"] + 0.1
    assert found["recon"] == pytest.approx(last["recon"], rel=1e-6) != first["recon"]


def test_without_heldout_rows_nothing_is_scored() -> None:
    trainer = make_trainer(stop_after_steps=1)
    trainer.run()
    refit_alignment(trainer)
    assert trainer.facts.keys() == {"refit_ridge"}


def test_it_is_refined_where_the_start_is() -> None:
    start, params = WarmStartParams(enabled=True, ridge=1.0), RefineParams(steps=5)
    plain, refined = (make_trainer(stop_after_steps=2, warm_start=start, refine=each) for each in (None, params))
    for trainer in (plain, refined):
        trainer.run()
        refit_alignment(trainer)
    assert not torch.equal(plain.student.alignment.weight, refined.student.alignment.weight)
    refine_alignment(plain.student, row_statistics(plain, None).scored_rows(), params, seed=0)
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(refined)[name], msg=name)


def test_of_the_student_that_was_kept_and_the_checkpoint_stays(tmp_path: Path) -> None:
    def trained() -> Trainer:
        changes = {"stop_after_steps": 6, "learning_rate": 3.0, "checkpoint_every": 2}
        heldout = HeldoutParams(every=1, select="recon")
        return make_trainer(checkpoint=tmp_path / "c", heldout_rows=some_rows(6), heldout=heldout, **changes)

    trainer = trained()
    trainer.run()
    content, kept = (tmp_path / "c").read_bytes(), weights(trainer)
    refit_alignment(trainer)
    assert trainer.validation is not None
    assert trainer.validation.best is not None
    best = trainer.validation.best.step
    assert best < 6
    assert trainer.facts["heldout_refitted"]["step"] == best
    assert torch.equal(trainer.student.tokens, kept["tokens"])
    assert (tmp_path / "c").read_bytes() == content
    again = trained()
    assert again.resume()
    again.run()
    assert all(torch.equal(value, kept[name]) for name, value in weights(again).items())
    assert not again.facts
