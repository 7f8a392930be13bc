"""Loss and gradients of our step against those of the reference's, with the same weights, ids and targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.reference.process import Peer
from bench.training_step.peers import ours, reference
from bench.training_step.preparation import with_batches
from bench.training_step.workload import Lengths, make_batches

EOS = 2
LENGTHS = Lengths(queries=[12, 40, 25, 31], responses=[60, 40, 90, 25])
LIMITS = {"fp32": (1e-5, 1e-4), "fp64": (1e-9, 1e-9)}
RUNS = (("fp32", "fast"), ("fp64", "fast"), ("fp64", "lean"))


@dataclass(frozen=True)
class Exactness:
    """Relative differences, and their limits.

    Attributes:
        dtype: precision of both sides.
        loss: of the loss.
        gradients: of each trained tensor, the norm of the difference by the norm of the reference's.
        ours_rounds: in float32, how far our gradients are from the reference's in float64, the furthest tensor.
        reference_rounds: the same of the reference's own.
    """

    dtype: str
    loss: float
    gradients: dict[str, float]
    ours_rounds: float = 0.0
    reference_rounds: float = 0.0

    @property
    def gradient(self) -> float:
        """The largest of the trained tensors."""
        return max(self.gradients.values())

    @property
    def within(self) -> bool:
        """Whether both keep their limits; rounding to float32 is not held against us where the reference rounds more.

        The network amplifies rounding some 10,000 times, on some rows far more.
        """
        loss, gradient = LIMITS[self.dtype]
        return self.loss <= loss and (self.gradient <= gradient or self.ours_rounds < self.reference_rounds)

    def line(self, name: str) -> dict[str, str]:
        """For people."""
        tensors = {tensor: f"{value:.1e}" for tensor, value in self.gradients.items()}
        return {"run": name, "loss": f"{self.loss:.1e}", **tensors, "verdict": "equal" if self.within else "DIFFERS"}


def compare(python: Path, base: Path, folder: Path, stream: Sequence[int], device: str) -> dict[str, Exactness]:
    """Compare on one batch, by precision and variant of ours."""
    work = with_batches(base, folder, make_batches(LENGTHS, len(LENGTHS.queries), stream, EOS))
    expected: dict[str, float] = {}
    for dtype in LIMITS:
        with reference(python, work, dtype, device, "exact") as peer:
            expected[dtype] = _gradients(peer, f"reference-{dtype}.npz")
    found = {}
    for dtype, variant in RUNS:
        with ours(work, dtype, device, variant) as peer:
            loss = _gradients(peer, f"{variant}-{dtype}.npz")
        gradients = _differences(work / f"{variant}-{dtype}.npz", work / f"reference-{dtype}.npz")
        difference = abs(loss - expected[dtype]) / abs(expected[dtype])
        rounds = [
            max(_differences(work / f"{side}-{dtype}.npz", work / "reference-fp64.npz").values())
            for side in (variant, "reference")
        ]
        found[dtype if variant == "fast" else f"{dtype}, {variant}"] = Exactness(dtype, difference, gradients, *rounds)
    return found


def _gradients(peer: Peer, file: str) -> float:
    return float(peer.ask("gradients", batch=0, file=file)["loss"])


def limits_exceeded(found: dict[str, Exactness]) -> bool:
    """Whether any comparison failed."""
    return not all(each.within for each in found.values())


def _differences(ours_file: Path, reference_file: Path) -> dict[str, float]:
    with np.load(ours_file) as mine, np.load(reference_file) as theirs:
        return {name: _relative(mine[name], theirs[name]) for name in theirs.files}


def _relative(found: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
