"""Some training steps on a backbone that is shared out, run by test_sharding.py in one process and in several.

python -m tests.backbone.sharded_run OUT FOLDER...     FOLDER: a backbone; OUT: what the first process ended with
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backbone.loading import BackboneParams
from pipeline.backbone.sharding import load_sharded
from pipeline.encoder.student import new_student
from pipeline.parallel.ranks import rank_process
from pipeline.train.losses import Batch, loss_sums

WIDTH, STEPS = 5, 3
# Rows of each forward pass of a step, of every process; () is a pass that only keeps the others company.
SHARES = [[(0,), (1, 2)], [(3, 4, 5), ()]]


def some_batch(rows: tuple[int, ...]) -> Batch:
    """Rows that begin alike and go on in lengths and tokens of their own; without any, one that is to weigh nothing."""
    generators = [np.random.default_rng(row) for row in rows or (99,)]
    queries = [[7, 8, 9, *generator.integers(3, 250, generator.integers(18, 30)).tolist()] for generator in generators]
    responses = [generator.integers(3, 250, generator.integers(1, 30)).tolist() for generator in generators]
    targets = np.stack([generator.normal(size=WIDTH) for generator in generators])
    return Batch(queries, responses, torch.from_numpy(targets.astype(np.float32)))


def train(backbone: Any, passes: Any, accelerator: Any) -> dict[str, np.ndarray]:
    """The student's tensors and the losses after some steps of gradient descent over all of SHARES."""
    student = new_student(backbone, WIDTH, compression_tokens=2, thought_tokens=1, seed=0)
    every = [rows for share in SHARES for rows in share]
    mine = SHARES[accelerator.process_index] if accelerator.num_processes > 1 else every
    parameters = list(student.parameters())
    losses = []
    with torch.no_grad():
        passes.query_pass(some_batch((0, 1)).query_ids, student.tokens, 2)  # as a warm start does
    for _ in range(STEPS):
        total = torch.zeros(())
        for rows in mine:
            sums = loss_sums(student, passes, some_batch(rows), "sum")
            loss = (sums.align + 0.1 * sums.recon) * (1.0 if rows else 0.0)
            loss.backward()
            total += loss.detach()
        losses.append(float(accelerator.reduce(total, "sum")))
        for parameter in parameters:
            parameter.data -= 1e-3 * accelerator.reduce(parameter.grad, "sum")
            parameter.grad = None
    return {**{name: value.detach().numpy() for name, value in student.named_parameters()}, "losses": np.array(losses)}


def kept(backbone: Any) -> float:
    """The part of the decoder layers' weights that this process holds."""
    from torch.distributed.tensor import DTensor

    parameters = list(backbone.get_decoder().layers.parameters())
    local = [value.to_local() if isinstance(value, DTensor) else value for value in parameters]
    return sum(value.numel() for value in local) / sum(value.numel() for value in parameters)


def run(folders: list[Path], out: Path, accelerator: Any) -> None:
    """Train on each backbone, both ways, and write what the first process has."""
    from pipeline.encoder.passes.plain import plain_passes
    from pipeline.encoder.passes.select import make_passes

    found = {}
    for folder in folders:
        backbone = load_sharded(BackboneParams(name=str(folder), dtype="float32"), accelerator)
        ways = {
            "plain": plain_passes(backbone),
            "fast": make_passes(backbone, share_prefix=False),
            "lean": make_passes(backbone, share_prefix=False, checkpoint_responses=True),
        }
        for way, passes in ways.items():
            trained = train(backbone, passes, accelerator)
            found |= {f"{folder.name} {way} {name}": value for name, value in trained.items()}
        found[f"{folder.name} kept"] = np.array(kept(backbone))
    if accelerator.is_main_process:
        np.savez(out, **found)


if __name__ == "__main__":
    from accelerate import Accelerator

    with rank_process():
        run([Path(folder) for folder in sys.argv[2:]], Path(sys.argv[1]), Accelerator())
