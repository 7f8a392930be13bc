"""Walk a full-size model on a GPU that does nothing: what it launches, copies and holds, and that devices fit.

    .venv/bin/python bench/gpu_walk.py --model qwen3-4b --rows 16
    .venv/bin/python bench/gpu_walk.py --model gemma3-1b --mode read embed head

Needs a C++ compiler, no GPU and no weights. Modes: a training step; the student reads; teachers embed; a step
of each phase of `teach`; lens and decoding (bench/walks). Each way of a mode prints a line of JSON:

    kernels         launches; of a training step forward, backward and the optimiser
    h2d, d2h        copies to the device; copies and reads from it
    peak_gb         most bytes of tensors alive
    h100_seconds    a roofline of all kernels at the peak of an H100 (SXM, bfloat16)
    estimate_gb     train, teach: what the plan computes for it (pipeline/optim/memory.py), the CUDA context left out
    mfu_ceiling_h100  train: model FLOPs over that roofline

A fused function counts as the kernels that it becomes on a GPU; which they are is said where it is defined.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT
from bench.fake_gpu import device, models

LIBRARY = ROOT / ".bench" / "fake_gpu"
MODES = ("train", "read", "embed", "teach", "head")


def main() -> None:
    """Walk, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3-4b"], choices=models.NAMES)
    parser.add_argument("--mode", nargs="+", default=["train"], choices=MODES)
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--rows", type=int, default=16, help="of the step; texts of a call")
    parser.add_argument("--micro-batches", type=int, default=1, help="train: response passes of the step")
    parser.add_argument("--queries-apart", action="store_true", help="train: a query pass for each micro-batch")
    parser.add_argument("--query", type=int, default=512, help="tokens of a query, or of a text")
    parser.add_argument("--response", type=int, default=512, help="train: tokens of a response")
    parser.add_argument("--shared", type=int, default=3, help="train: tokens that all queries begin with")
    parser.add_argument("--attention", default="auto", help="train: of the packed passes")
    parser.add_argument("--checkpoint-responses", action="store_true", help="train: recompute layers in backward")
    parser.add_argument("--recompute-gates", type=float, help="train: share of the layers")
    parser.add_argument("--uncompared", action="store_true", help="train: take the fastest passes, which is quicker")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train: adapters; 0: none")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device.load(device.build(LIBRARY))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    for name, mode in product(arguments.model, arguments.mode):
        for found in walk(name, mode, arguments):
            print(json.dumps({"model": name, "mode": mode, **found}), flush=True)


def walk(name: str, mode: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The numbers of each way of a mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.walks import inference, teaching
    from bench.walks.training import TrainingStep

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    config = models.config_of(name, arguments.layers)
    if mode == "train":
        step = TrainingStep(
            rows=arguments.rows,
            micro_batches=arguments.micro_batches,
            queries_apart=arguments.queries_apart,
            query=arguments.query,
            response=arguments.response,
            shared=arguments.shared,
            attention=arguments.attention,
            checkpoint_responses=arguments.checkpoint_responses,
            recompute_gates=arguments.recompute_gates,
            lora=arguments.lora,
            compared=not arguments.uncompared,
        )
        yield step.walk(config, fake)
    elif mode == "teach":
        yield from teaching.walk(config, fake)
    else:
        yield from inference.walk(mode, config, fake, rows=arguments.rows, length=arguments.query)


if __name__ == "__main__":
    main()
