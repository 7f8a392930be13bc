"""Gates behind a stage: limits on what may be wrong with its rows, before the next stage spends hours on them.

A stage measures shares of its rows. A warning names those above their limits at the first thousand rows of a run; at
the end they fail the stage, whose finished rows stay in its store.
"""

import logging
from collections.abc import Mapping

from pipeline.core.config import Params
from pipeline.core.errors import PipelineError

log = logging.getLogger(__name__)

# Rows of a run after which its gates are looked at for the first time.
FIRST_ROWS = 1000


def check_gates(
    gates: Params, measured: Mapping[str, float], causes: Mapping[str, str], error: type[PipelineError]
) -> None:
    """Raises `error` about every measure above its limit.

    Args:
        gates: a limit by the name of its measure.
        measured: shares, or other numbers that should be low.
        causes: what each measure counts, behind its value in a sentence, and what to do.
        error: class of the error, whose argument is `gates.<name>`.
    """
    problems = gate_problems(gates, measured, causes)
    if not problems:
        return
    [(name, first), *others] = problems.items()
    lines = [first, *(f"gates.{other}: {problem}" for other, problem in others)]
    message = "\n".join([*lines, "Finished rows are kept: after a higher limit the stage ends in seconds"])
    raise error(message, argument=f"gates.{name}")


def warn_of_gates(stage: str, gates: Params, measured: Mapping[str, float], causes: Mapping[str, str]) -> None:
    """Log every measure above its limit in the first rows of a run."""
    for name, problem in gate_problems(gates, measured, causes).items():
        log.warning("%s: among the first rows %s; at its end gates.%s fails the stage", stage, problem, name)


def gate_problems(gates: Params, measured: Mapping[str, float], causes: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with each measure above its limit, by its name; arguments as of `check_gates`."""
    limits: dict[str, float] = gates.model_dump()
    return {
        name: f"{value:.4g} {causes[name]}; the limit is {limits[name]:g}"
        for name, value in measured.items()
        if value > limits[name]
    }
