"""What gradient steps add to the closed form: the student of a training checkpoint against its own start.

A checkpoint of the trainer holds both; students of further checkpoints can stand beside them. Their embeddings are the
predicted response alone, a share of 1, read from the compression tokens; the workspace's params name the backbone and
the tasks, and their template must be that of the training.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.config import PARAMS_FILE, load
from pipeline.readings.closed_form import Prediction
from pipeline.readings.systems import ReadingSystem
from pipeline.train.ridge import LinearMap

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.optim.checkpoint import Checkpoint
    from pipeline.readings.states import FrozenBackbone

PREFIXES = {"student": "trained.student.", "start": "kept.start."}


@dataclass(frozen=True)
class Named(ReadingSystem):
    """A reading that a comparison knows under a name of its own."""

    label: str = ""

    @property
    def name(self) -> str:
        return self.label


def compare(folder: Path, checkpoints: Sequence[Path], suite: str) -> dict[str, Any]:
    """Student of the first checkpoint minus its start and minus the students of the others, on the tasks of a suite.

    Also how many steps are between student and start. Another student has the name of its file.
    """
    from pipeline.core.run import work_dir
    from pipeline.evaluate.deltas import task_deltas
    from pipeline.evaluate.run import run_systems
    from pipeline.evaluate.summary import flat_metrics, summary_table
    from pipeline.optim.checkpoint import read_checkpoint
    from pipeline.readings.build import Inputs, frozen_backbone
    from pipeline.tasks.instructions import load_instructions
    from pipeline.tasks.suites import find_tasks

    os.chdir(folder)
    inputs, found = load(PARAMS_FILE, Inputs), list(map(read_checkpoint, checkpoints))
    if None in found:
        raise SystemExit(f"{checkpoints[found.index(None)]}: no intact checkpoint")
    first, *others = filter(None, found)
    students = {name: tensors_of(first, prefix) for name, prefix in PREFIXES.items()}
    students |= {
        path.stem: tensors_of(each, PREFIXES["student"]) for path, each in zip(checkpoints[1:], others, strict=True)
    }
    evaluate, dtype = inputs.evaluate, inputs.evaluate.dtype
    tasks = find_tasks([Path(evaluate.local_dir) / name for name in inputs.suites[suite].local])
    with ExitStack() as stack:
        systems = compared(frozen_backbone(inputs), students, work_dir("hidden"), stack)
        runs = run_systems(systems, tasks, load_instructions(), work=work_dir("readings"), dtype=dtype)
    deltas = task_deltas(tasks, runs, evaluate.bootstrap)
    scores = flat_metrics(summary_table(tasks, runs))
    return {"steps": len(first.progress["curve"]), "scores": scores, "deltas": [asdict(delta) for delta in deltas]}


def tensors_of(checkpoint: "Checkpoint", prefix: str) -> "dict[str, Tensor]":
    """The tensors of a student in a checkpoint, by the student's own names."""
    tensors = checkpoint.tensors
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def compared(
    backbone: "FrozenBackbone", students: "Mapping[str, Mapping[str, Tensor]]", hidden: Path, stack: ExitStack
) -> Iterator[Named]:
    """Students by name, as systems whose states are kept in the folder `hidden`."""
    from pipeline.evaluate.embedding_cache import CachedSystem
    from pipeline.readings.states import TemplateStates

    opened: dict[bytes, CachedSystem] = {}  # by tokens: a fitted alignment has those of the student it was fitted to
    for label, own in students.items():
        key = own["tokens"].numpy().tobytes()
        if key not in opened:
            template = TemplateStates("prompt", replace(backbone, new_tokens=own["tokens"].to(backbone.new_tokens)))
            states = CachedSystem(template, hidden, embeddings_dtype="float16")
            opened[key] = stack.enter_context(closing(states))
        yield Named("tokens", opened[key], prediction=prediction(own), label=label)


def prediction(own: "Mapping[str, Tensor]") -> Prediction:
    """Both projections as one map; lengths play no part."""
    first, second = (
        LinearMap(*(own[f"{name}.{part}"].double().numpy() for part in ("weight", "bias")))
        for name in ("reconstruction", "alignment")
    )
    joined = LinearMap(second.weight @ first.weight, second.weight @ first.bias + second.bias)
    return Prediction(joined, ridge=float("nan"), length=1.0, reading_length=1.0, target_length=1.0)
