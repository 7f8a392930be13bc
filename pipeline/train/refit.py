"""The alignment fitted again in closed form, once the steps are over.

The embedding is linear in the soft prompts. So whatever the steps made of tokens and reconstruction, the best linear
map to the targets needs no gradient, as at the start (`pipeline.train.warm_start`).
"""

import logging
from dataclasses import asdict

from pipeline.train.reading import row_statistics
from pipeline.train.refine import refine_alignment
from pipeline.train.ridge import LinearMap
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import Statistics, closed_form

log = logging.getLogger(__name__)


def refit_alignment(trainer: Trainer) -> None:
    """Put the closed form in the place of a trainer's alignment; tokens and reconstruction stay.

    Rows and strength are those of `params.warm_start`. The strength, and the held-out scores if there are such rows,
    become facts of the trainer. Raises TrainingError if a hidden state is not finite.
    """
    statistics = row_statistics(trainer, trainer.params.warm_start.rows)
    if trainer.accelerator.is_main_process:
        _fit(trainer, statistics)
    trainer.agree()
    if (validation := trainer.validation) is not None:
        scores = trainer.heldout_scores(validation)
        log.info("held out with the alignment fitted again: %s", scores)
        step = validation.best.step if validation.best else len(trainer.curve)
        trainer.facts["heldout_refitted"] = {"step": step, **asdict(scores)}


def _fit(trainer: Trainer, statistics: Statistics) -> None:
    student, params = trainer.student, trainer.params
    by = LinearMap.of_layer(student.reconstruction)
    fitted, used = closed_form(statistics.folds(), by, params.warm_start.ridge)
    fitted.write_to(student.alignment)
    trainer.facts["refit_ridge"] = used
    log.info("alignment fitted again: ridge %g over %d rows", used, len(statistics))
    if params.refine:
        refine_alignment(student, statistics.scored_rows(), params.refine, seed=params.seed)
