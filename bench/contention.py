"""What a busy neighbour costs a stage on a CPU, by how OpenMP's threads wait for work.

    .venv/bin/python bench/contention.py [--rounds 3] [--workloads train embed] [--waitings default shipped passive]

`default` is how GNU OpenMP waits by itself, `shipped` is what the stages set (`prepare_threads`); others are for the
choice. Each workload runs the real small models in one process for each way of waiting, which take turns: on the idle
machine (`idle`), after a process came that multiplies matrices with as many threads as there are cores (`later`), and
in new processes that start beside it (`beside`). Medians of wall seconds. `ratio_<workload>` is beside over idle as
shipped; `idle_cost` is the highest cost of `shipped` over `default` on the idle machine, 0.03 for 3 %. Nothing else may
run meanwhile.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import BACKBONE, ROOT, TEACHER, demo_queries, prepare_models, show
from pipeline.core.run import prepare_threads

WAITINGS: dict[str, dict[str, str]] = {
    "default": {"GOMP_SPINCOUNT": "300000"},  # GNU OpenMP's own; vLLM's engine sets another one unless it stands here
    "shipped": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin1000": {"GOMP_SPINCOUNT": "1000"},
    "spin3000": {"GOMP_SPINCOUNT": "3000"},
    "spin5000": {"GOMP_SPINCOUNT": "5000"},
    "spin10000": {"GOMP_SPINCOUNT": "10000"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BUSY = """
import torch
left, right = torch.randn(700, 700), torch.randn(700, 700)
while True:
    left @ right
"""


def train() -> Callable[[], object]:
    """A training step of 8 rows: both passes, backward, update."""
    import torch

    from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
    from pipeline.encoder.passes.select import make_passes
    from pipeline.encoder.student import new_student
    from pipeline.train.losses import Batch, loss_sums

    params = BackboneParams(name=str(BACKBONE))
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    passes = make_passes(model)
    student = new_student(model, 384, compression_tokens=10, thought_tokens=0, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ids = tokenizer(demo_queries(16))["input_ids"]
    batch = Batch(ids[:8], [row * 3 for row in ids[8:]], torch.ones(8, 384))

    def step() -> None:
        sums = loss_sums(student, passes, batch, "mean")
        torch.autograd.backward(sums.align / sums.rows + sums.recon / sums.tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


def embed() -> Callable[[], object]:
    """A teacher embeds 256 texts."""
    from pipeline.embed.teachers.sentence_transformers import SentenceTransformersTeacher

    teacher = SentenceTransformersTeacher(str(TEACHER), revision=None, max_tokens=256, dtype="float32")
    texts = demo_queries(256)
    return lambda: teacher.embed(texts)


def evaluate() -> Callable[[], object]:
    """A student embeds 48 texts."""
    from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.student import new_student

    params = BackboneParams(name=str(BACKBONE))
    model = load_backbone(params)
    student = new_student(model, 384, compression_tokens=10, thought_tokens=0, seed=0)
    config = EncoderConfig(
        backbone={"name": str(BACKBONE)},
        chat_template_kwargs={},
        template="chat",
        max_query_tokens=256,
        compression_tokens=10,
        thought_tokens=0,
        hidden=model.config.hidden_size,
        width=384,
        teacher={},
    )
    encoder = Encoder(model, load_tokenizer(params), student, config, {})
    texts = demo_queries(48)
    return lambda: encoder.embed(texts)


def generate() -> Callable[[], object]:
    """vLLM answers 16 prompts with 16 tokens."""
    from bench.generate import MAX_PROMPT_TOKENS, prompts
    from pipeline.backbone.loading import BackboneParams
    from pipeline.generate.engines.base import Prompt, Sampling
    from pipeline.generate.engines.registry import build_engine, prepare_environment

    prepare_environment("vllm")
    rows = [Prompt(str(index), ids, index) for index, ids in enumerate(prompts(16))]
    engine = build_engine(
        "vllm",
        BackboneParams(name=str(BACKBONE)),
        dtype="float32",
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=16,
    )
    return lambda: list(engine.generate(rows, Sampling(16)))


WORKLOADS = {"train": train, "embed": embed, "evaluate": evaluate, "generate": generate}


def serve(workload: str, waiting: str) -> None:
    """A measured process: for each line on stdin the wall seconds of one run on stdout."""
    replies = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    if waiting == "shipped":
        prepare_threads()
    work = WORKLOADS[workload]()
    work()
    os.write(replies, b"0\n")
    for _ in sys.stdin:
        started = time.monotonic()
        work()
        os.write(replies, f"{time.monotonic() - started}\n".encode())


@contextlib.contextmanager
def process(command: list[str], variables: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A child that is killed at the end."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    child = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def answer(child: "subprocess.Popen[str]") -> float:
    """Seconds of the run that was asked for, or 0 when the child is ready.

    Raises:
        SystemExit: the child ended.
    """
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        sys.exit(f"{' '.join(map(str, child.args))} ended with {child.wait()}")  # type: ignore[arg-type]
    return float(line)


def ask(child: "subprocess.Popen[str]") -> float:
    """Run the workload once."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return answer(child)


def measure(workload: str, waitings: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by way of waiting: idle, with a neighbour that came later, and started beside the neighbour."""
    with contextlib.ExitStack() as stack:
        with sides(workload, waitings) as started:
            idle = _medians(started, rounds)
            stack.enter_context(process(["-c", BUSY], {}))
            time.sleep(5)
            later = _medians(started, rounds)
        with sides(workload, waitings) as started:
            beside = _medians(started, rounds)
    return {name: {"idle": idle[name], "later": later[name], "beside": beside[name]} for name in waitings}


@contextlib.contextmanager
def sides(workload: str, waitings: list[str]) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """A process that is ready to run the workload for each way of waiting."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name in waitings:
            command = ["bench/contention.py", "--serve", workload, name]
            started[name] = stack.enter_context(process(command, WAITINGS[name]))
            answer(started[name])
        yield started


def _medians(sides: dict[str, "subprocess.Popen[str]"], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, child in sides.items():
            taken[name].append(ask(child))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Measure and report, or serve one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--waitings", nargs="+", choices=[*WAITINGS], default=["default", "shipped"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    prepare_models()
    rows: list[dict[str, Any]] = []
    result: dict[str, float] = {}
    costs = []
    for workload in arguments.workloads:
        found = measure(workload, arguments.waitings, arguments.rounds)
        rows += [
            {
                "workload": workload,
                "waiting": name,
                **{state: round(value, 2) for state, value in seconds.items()},
                "later/idle": round(seconds["later"] / seconds["idle"], 2),
                "beside/idle": round(seconds["beside"] / seconds["idle"], 2),
            }
            for name, seconds in found.items()
        ]
        if {"default", "shipped"} <= found.keys():
            shipped = found["shipped"]
            result[f"ratio_{workload}"] = round(shipped["beside"] / shipped["idle"], 2)
            result[f"ratio_{workload}_later"] = round(shipped["later"] / shipped["idle"], 2)
            costs.append(shipped["idle"] / found["default"]["idle"] - 1)
    if costs:
        result["idle_cost"] = round(max(costs), 3)
    show("seconds of a run, idle and beside a busy process", rows, result)


if __name__ == "__main__":
    main()
