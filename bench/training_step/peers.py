"""The two sides of a training step as measured processes."""

import sys
from pathlib import Path

from bench.reference.process import Peer


def reference(python: Path, work: Path, dtype: str, device: str, variant: str = "timed") -> Peer:
    """The reference's side, after it wrote the targets that ours reads; `exact` has a teacher of that precision."""
    peer = Peer("bench.training_step.reference", python, work, dtype=dtype, device=device, variant=variant)
    peer.ask("targets", file=f"targets-{dtype}.npz")
    return peer


def ours(work: Path, dtype: str, device: str, variant: str) -> Peer:
    """Our side."""
    return Peer("bench.training_step.ours", sys.executable, work, dtype=dtype, device=device, variant=variant)
