"""Encoding beside the reference implementation's own: texts per second, and whether the embeddings are the same.

    .venv/bin/python bench/encode.py [--rounds 2] [--texts 128] [--device cpu] [--quick]

The reference (PyPI llm2vec-gen) runs unmodified in an environment of its own, made on the first run. Same weights (the
demo's backbone, a student with random projections), same texts, same token ids:

    ours        `Encoder.encode`, with the token budget that it chooses itself
    reference   its `encode`, which takes what it is given as one batch, on 32 texts after the other
    sorted      its evaluation script's way: texts sorted by characters, then the same

Texts: passages whose lengths spread as queries' do (log-normal, on average 30 tokens), behind an instruction and bare;
where the real data is there, texts of three tasks, each with its own instruction; and texts of one length, which leave
nothing to padding: about what remains against many texts sorted. Each side runs in a process of its own, in turn.
Medians over rounds (one but for the spread lengths) of CPU seconds of all threads, on a GPU wall seconds, and of wall
seconds; texts/s are by wall seconds. Differences are relative: of each text the norm of the difference by the norm of
the reference's embedding, the largest of all texts. Exits with 1 if one in fp32 is above 1e-5.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.common import prepare_models, print_table
from bench.encoding.preparation import prepare
from bench.encoding.workloads import SUMMARIZE, TASKS, Texts, Workload
from bench.reference import environment
from bench.reference.process import Peer
from bench.reference.workspace import TOKENS

LIMIT = 1e-5
DTYPES = ("fp32", "bf16")
# Label of a side: which process, and the way it is asked for.
SIDES = {"ours": ("ours", "given"), "reference": ("reference", "given"), "sorted": ("reference", "sorted")}
MIXED, BARE, WARM = "spread lengths", "spread lengths, bare", "first call"
OTHERS = ("reference", "sorted")
LENGTHS = (16, 64, 256)


@dataclass(frozen=True)
class Taken:
    """Seconds of one side on one workload, one a round."""

    cpu: list[float]
    wall: list[float]

    @property
    def seconds(self) -> float:
        """Median CPU seconds, on a GPU wall seconds."""
        return statistics.median(self.cpu)

    @property
    def wall_seconds(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall)


@dataclass(frozen=True)
class Measured:
    """All sides on one workload in one precision; `embeddings` is where each side's last ones are."""

    workload: Workload
    taken: dict[str, Taken]
    embeddings: dict[str, Path]

    def speedup(self, against: str) -> float:
        """How many times as fast as another side ours is."""
        return round(self.taken[against].seconds / self.taken["ours"].seconds, 2)

    def wall_speedup(self, against: str) -> float:
        """The same by wall seconds."""
        return round(self.taken[against].wall_seconds / self.taken["ours"].wall_seconds, 2)

    def rate(self, side: str) -> float:
        """Texts a wall second."""
        return round(len(self.workload.texts) / self.taken[side].wall_seconds, 1)

    def difference(self, side: str) -> float:
        """The largest relative difference of ours from another side's."""
        return float(relative(np.load(self.embeddings["ours"]), np.load(self.embeddings[side])).max())


def relative(found: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Of each row the norm of the difference by the norm of what is expected."""
    return np.asarray(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))


@contextlib.contextmanager
def peers(python: Path, work: Path, dtype: str, device: str) -> Iterator[dict[str, Peer]]:
    """Both processes, loaded."""
    options = {"dtype": dtype, "device": device}
    with (
        Peer("bench.encoding.reference", python, work, **options) as reference,
        Peer("bench.encoding.ours", sys.executable, work, **options) as ours,
    ):
        yield {"ours": ours, "reference": reference}


def measure(found: dict[str, Peer], work: Path, dtype: str, name: str, workload: Workload, rounds: int) -> Measured:
    """All sides in turn; the evaluation script cannot do without an instruction."""
    sides = {label: side for label, side in SIDES.items() if workload.instruction or label != "sorted"}
    files = {label: work / f"{name}-{dtype}-{label}.npy" for label in sides}
    taken: dict[str, Taken] = {label: Taken([], []) for label in sides}
    for _ in range(rounds):
        for label, (peer, way) in sides.items():
            answer = found[peer].ask("encode", workload=name, way=way, file=files[label].name)
            taken[label].cpu.append(answer["seconds"])
            taken[label].wall.append(answer["wall"])
    done = Measured(workload, taken, files)
    print(f"{dtype}, {name}: {done.speedup('reference')} times as fast", file=sys.stderr, flush=True)
    return done


def warm_up(found: dict[str, Peer], name: str) -> None:
    """What only a first call pays."""
    for label, (peer, way) in SIDES.items():
        found[peer].ask("encode", workload=name, way=way, file=f"warm-{label}.npy")


def line(name: str, found: Measured) -> dict[str, Any]:
    """For people."""
    there = found.taken
    return {
        "texts": name,
        **{f"{label}/s": found.rate(label) if label in there else "" for label in SIDES},
        **{f"vs {label}": found.speedup(label) if label in there else "" for label in OTHERS},
        **{f"wall, {label}": found.wall_speedup(label) if label in there else "" for label in OTHERS},
        "CPU s": " / ".join(f"{each.seconds:.1f}" for each in there.values()),
        "difference": f"{found.difference('reference'):.1e}",
    }


def figures(found: Measured) -> dict[str, Any]:
    """For programs."""
    others = [label for label in OTHERS if label in found.taken]
    return {
        "lengths": found.workload.facts(TOKENS),
        "texts_per_s": {label: found.rate(label) for label in found.taken},
        "speedup": {label: found.speedup(label) for label in others},
        "wall_speedup": {label: found.wall_speedup(label) for label in others},
        "difference": {label: found.difference(label) for label in others},
    }


def rounding(found: Mapping[str, Mapping[str, Measured]]) -> dict[str, float]:
    """How far bf16 is from the reference in fp32, on average: of ours and of the reference."""
    exact = np.load(found["fp32"][MIXED].embeddings["reference"])
    sides = found["bf16"][MIXED].embeddings
    return {f"rounding_bf16_{side}": float(relative(np.load(sides[side]), exact).mean()) for side in SIDES}


def over_tasks(found: Mapping[str, Measured]) -> dict[str, float]:
    """How many times as fast ours is, the geometric mean of the real tasks; nothing where their data is not there."""
    tasks = [each for name, each in found.items() if name in TASKS]
    if not tasks:
        return {}
    return {label: round(statistics.geometric_mean(each.speedup(label) for each in tasks), 2) for label in OTHERS}


def summary(found: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """The figures that have goals first, then all."""
    mixed = {dtype: each[MIXED] for dtype, each in found.items()}
    exact = found["fp32"].values()
    result: dict[str, Any] = {f"speedup_{dtype}": each.speedup("reference") for dtype, each in mixed.items()}
    result["largest_difference_fp32"] = max(each.difference(side) for each in exact for side in each.taken)
    for dtype, each in mixed.items():
        result[f"wall_speedup_{dtype}"] = each.wall_speedup("reference")
        result[f"speedup_sorted_{dtype}"] = each.speedup("sorted")
        result[f"wall_speedup_sorted_{dtype}"] = each.wall_speedup("sorted")
        result[f"speedup_bare_{dtype}"] = found[dtype][BARE].speedup("reference")
        result |= {f"speedup_tasks_{label}_{dtype}": value for label, value in over_tasks(found[dtype]).items()}
    result |= rounding(found)
    result["all"] = {dtype: {name: figures(each) for name, each in some.items()} for dtype, some in found.items()}
    return result


def make_workloads(settings: argparse.Namespace) -> dict[str, Workload]:
    """By name: spread lengths, what each side is given first, real tasks, single lengths."""
    texts = Texts()
    return {
        MIXED: texts.spread(settings.texts, SUMMARIZE),
        BARE: texts.spread(settings.texts, ""),
        WARM: texts.spread(8, SUMMARIZE),
        **({} if settings.quick else texts.tasks()),
        **{f"{length} tokens": texts.alike(32, length) for length in settings.lengths},
    }


def main() -> None:
    """Prepare, measure, report; exits with 1 where the embeddings are not the same."""
    settings = parse()
    prepare_models()
    python = environment.python()
    with tempfile.TemporaryDirectory(dir=environment.HOME, prefix="work-") as scratch:
        work = Path(scratch) / "work"
        workloads = make_workloads(settings)
        prepare(work, workloads)
        print_table("texts", [{"name": name, **each.facts(TOKENS)} for name, each in workloads.items()])
        found: dict[str, dict[str, Measured]] = {}
        for dtype in DTYPES:
            with peers(python, work, dtype, settings.device) as both:
                warm_up(both, WARM)
                found[dtype] = {
                    name: measure(both, work, dtype, name, each, settings.rounds if name == MIXED else 1)
                    for name, each in workloads.items()
                    if name != WARM
                }
        for dtype, some in found.items():
            print_table(f"SmolLM2-135M, {dtype}: texts/s, and times as fast", [line(*each) for each in some.items()])
        result = summary(found)
    print(json.dumps({**result, "device": settings.device}))
    if not result["largest_difference_fp32"] <= LIMIT:
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line; `--quick` is one round of fewer texts, without the real tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of the spread lengths")
    parser.add_argument("--texts", type=int, default=128, help="texts of spread lengths")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="one round, 64 texts, two single lengths, no real tasks")
    settings = parser.parse_args()
    settings.lengths = LENGTHS
    if settings.quick:
        settings.rounds, settings.texts, settings.lengths = 1, 64, (16, 128)
    if settings.device is None:
        from pipeline.backbone.device import best_device

        settings.device = best_device()
    return settings


if __name__ == "__main__":
    main()
