"""One training step of the reference implementation beside ours: time, memory, and whether they compute the same.

    .venv/bin/python bench/train.py [--dtype bf16] [--rounds 3] [--steps 3] [--device cpu] [--quick]

The reference (PyPI llm2vec-gen) runs unmodified in an environment of its own, made on the first run: its trainer's
`training_step` with its own settings (gradient checkpointing, two copies of the backbone, a teacher in each step,
left-padded batches). Ours runs the passes of `train` as they are by default ("fast") and with the response pass
checkpointed ("lean"); its targets come from that same teacher, once, as the stage `embed` computes them.

Same weights, same token ids, same start, same AdamW. First loss and gradients are compared in float32 and float64.
Then the three sides, each in a process of its own, take the same steps in turn; medians over rounds of CPU seconds
(on a GPU wall seconds), and the highest resident set of each process (on a GPU what torch allocated). Last, how our
cost grows with the tokens of a batch and with the vocabulary.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import prepare_models, print_table, run, show, text_stream
from bench.reference import environment
from bench.reference.process import Peer
from bench.reference.workspace import prepare_workspace
from bench.training_step.exactness import Exactness, compare, limits_exceeded
from bench.training_step.peers import ours, reference
from bench.training_step.preparation import with_batches
from bench.training_step.workload import DISTRIBUTIONS, lengths, make_batches

EOS = 2
SIDES = ("reference", "fast", "lean")


@contextlib.contextmanager
def sides(python: Path, work: Path, dtype: str, device: str) -> Iterator[dict[str, Peer]]:
    """All three sides, loaded."""
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(reference(python, work, dtype, device))
        others = {variant: stack.enter_context(ours(work, dtype, device, variant)) for variant in SIDES[1:]}
        yield {"reference": peer, **others}


def measure(peers: dict[str, Peer], batches: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds of each side's seconds for the batches, its memory, and its very first loss."""
    first = {side: peer.ask("steps", batches=batches[:1])["steps"][0]["loss"] for side, peer in peers.items()}
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in peers}
    for number in range(rounds):
        for side, peer in peers.items():
            steps = peer.ask("steps", batches=batches)["steps"]
            totals = {name: sum(step[name] for step in steps) for name in ("seconds", "wall")}
            taken[side].append(totals)
            print(f"round {number + 1}: {side} {totals['seconds']:.1f} s", file=sys.stderr, flush=True)
    return {
        side: {
            "first_loss": first[side],
            "rounds": [round(each["seconds"], 2) for each in taken[side]],
            "seconds": statistics.median(each["seconds"] for each in taken[side]) / len(batches),
            "wall": statistics.median(each["wall"] for each in taken[side]) / len(batches),
            **peer.ask("memory"),
        }
        for side, peer in peers.items()
    }


def table(name: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines for people."""
    base = found["reference"]
    return [
        {
            "lengths": name,
            "side": side,
            "s/step": round(each["seconds"], 2),
            "times as fast": round(base["seconds"] / each["seconds"], 2),
            "wall s/step": round(each["wall"], 2),
            "peak MiB": round(each["peak"]),
            "of reference": round(each["peak"] / base["peak"], 2),
            "loading MiB": round(each["load_peak"]),
            "beyond model": round(each["beyond"]),
            "rounds, s": str(each["rounds"]),
        }
        for side, each in found.items()
    ]


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures that have goals."""
    base = found["reference"]
    result = {}
    for side, suffix in (("fast", ""), ("lean", "_lean")):
        each = found[side]
        result[f"speedup{suffix}"] = round(base["seconds"] / each["seconds"], 2)
        result[f"memory_ratio{suffix}"] = round(each["peak"] / base["peak"], 3)
        result[f"wall_speedup{suffix}"] = round(base["wall"] / each["wall"], 2)
        result[f"beyond_model_ratio{suffix}"] = round(each["beyond"] / base["beyond"], 3)
    return result


def growth(batches: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Our cost against tokens and against the vocabulary, shown."""
    command = ["-m", "bench.training_step.growth", "--batches", str(batches)]
    command += ["--dtype", settings.dtype, "--device", settings.device, *(["--quick"] if settings.quick else [])]
    found: dict[str, Any] = run(command).result
    for against, lines in found.items():
        print_table(f"our cost against {against}", [{k: round(v, 3) for k, v in line.items()} for line in lines])
    return found


def report_exactness(found: dict[str, Exactness]) -> dict[str, float]:
    """Show the comparison and return its figures."""
    print_table("loss and gradients against the reference's", [each.line(name) for name, each in found.items()])
    return {
        "loss_difference": found["fp32"].loss,
        "gradient_difference": found["fp32"].gradient,
        "rounding_ours": found["fp32"].ours_rounds,
        "rounding_reference": found["fp32"].reference_rounds,
        "loss_difference_fp64": found["fp64"].loss,
        "gradient_difference_fp64": found["fp64"].gradient,
        "gradient_difference_fp64_lean": found["fp64, lean"].gradient,
    }


def main() -> None:
    """Prepare, compare, measure, report; exits with 1 where the two sides do not compute the same."""
    settings = parse()
    prepare_models()
    python = environment.python()
    with tempfile.TemporaryDirectory(dir=environment.HOME, prefix="work-") as scratch:
        base = Path(scratch) / "base"
        result: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        prepare_workspace(base)
        stream = text_stream()
        exact = compare(python, base, Path(scratch) / "exact", stream, settings.device)
        result |= report_exactness(exact)
        for name in settings.distributions:
            distribution = DISTRIBUTIONS[name]
            chosen = lengths(distribution, settings.steps)
            batches = make_batches(chosen, distribution.batch, stream, EOS)
            work = with_batches(base, Path(scratch) / name, batches)
            with sides(python, work, settings.dtype, settings.device) as peers:
                found = measure(peers, list(range(settings.steps)), settings.rounds)
            lines += table(name, found)
            standard = name == "standard"
            result |= ratios(found) if standard else {name: ratios(found)}
            result |= {f"lengths_{name}": chosen.facts(distribution.batch)}
            if standard:
                first, theirs = found["fast"]["first_loss"], found["reference"]["first_loss"]
                result["loss_difference_as_timed"] = abs(first - theirs) / abs(theirs)
        result["growth"] = growth(Path(scratch) / "standard" / "batches.json", settings)
    result |= {"dtype": settings.dtype, "device": settings.device}
    unit = "CPU seconds of all threads" if settings.device == "cpu" else "wall seconds"
    show(f"one training step, SmolLM2-135M, {settings.dtype}, {unit}", lines, result)
    if limits_exceeded(exact):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line; `--quick` is one round of one distribution and a shorter look at growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="batches a round")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="one round, two steps, the standard lengths only")
    settings = parser.parse_args()
    settings.distributions = [*DISTRIBUTIONS]
    if settings.quick:
        settings.rounds, settings.steps, settings.distributions = 1, 2, ["standard"]
    if settings.device is None:
        from pipeline.backbone.device import best_device

        settings.device = best_device()
    return settings


if __name__ == "__main__":
    main()
