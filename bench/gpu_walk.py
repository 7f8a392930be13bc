"""Walk a training step of a full-size model on a GPU that does nothing: what it launches, copies and holds.

    .venv/bin/python bench/gpu_walk.py --model qwen3-4b --rows 16

Needs a C++ compiler, no GPU and no weights. The last line is JSON:

    kernels         launches of a step, forward, backward and optimiser; of one micro-batch unless --micro-batches
    h2d, d2h        copies to the device; copies and reads from it
    peak_gb         most bytes of tensors alive
    estimate_gb     what the plan computes for it (pipeline/optim/memory.py), the CUDA context left out
    mfu_ceiling_h100  model FLOPs over a roofline of all kernels, at the peak of an H100 (SXM, bfloat16)

A fused function counts as the kernels that it becomes on a GPU; which they are is said where it is defined.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT
from bench.fake_gpu import device, models
from pipeline.optim.gpus import GPUS

# Operations and bytes a second, and what a launch costs the host.
H100 = {"flops": GPUS["H100"].flops, "bandwidth": GPUS["H100"].bandwidth, "launch": 4e-6}
LIBRARY = ROOT / ".bench" / "fake_gpu"
COMPRESSION_TOKENS = 10


@contextmanager
def without_values() -> Iterator[None]:
    """Passes are run and not compared with the plain ones: fake tensors have no values, and so no plain pass."""
    import torch

    from bench.fake_gpu.stand_ins import rms_norm, stand_in
    from pipeline.backbone import fused, output_head
    from pipeline.encoder.passes import select

    class FirstOne:
        """Takes the first candidate."""

        def __init__(self, *_: Any, **__: Any) -> None:
            """Nothing is run."""

        def first_equal(self, candidates: Iterator[tuple[str, Any]]) -> Any:
            """The fastest way that the backbone's structure allows."""
            return next((candidate for _, candidate in candidates), None)

    kept = select.Comparison, output_head._difference, fused.equals, fused.compiled, torch.nn.functional.rms_norm
    select.Comparison, output_head._difference = FirstOne, lambda *_: 0.0  # type: ignore[misc,assignment]
    # Gemma multiplies by one more than the weight: its norms are refused.
    fused.equals, fused.compiled = lambda module, _: type(module).__name__ != "Gemma3RMSNorm", stand_in  # type: ignore[assignment]
    torch.nn.functional.rms_norm = rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        select.Comparison, output_head._difference, fused.equals, fused.compiled = kept[:4]  # type: ignore[misc]
        torch.nn.functional.rms_norm = kept[4]


@contextmanager
def real_on_the_host() -> Iterator[None]:
    """Owners and positions of tokens are computed for real, from lengths; memory of the host cannot be pinned here."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    from pipeline.backbone.attention import segments

    kept = segments._tokens, torch.Tensor.pin_memory

    def tokens(runs: Any) -> Any:
        with _disable_current_modes():
            return kept[0](runs)

    segments._tokens = tokens
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        segments._tokens, torch.Tensor.pin_memory = kept  # type: ignore[method-assign]


@contextmanager
def in_place() -> Iterator[None]:
    """Modules are made on the device at once and stay there: torch cannot move modules of fake tensors."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    kept = BaseTunerLayer._move_adapter_to_device_of_base_layer, torch.nn.Module.to
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *_, **__: None
    torch.nn.Module.to = lambda module, *_, **__: module  # type: ignore[assignment,method-assign]
    try:
        with torch.device(device.DEVICE):
            yield
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer, torch.nn.Module.to = kept  # type: ignore[method-assign]


def walk(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the second step; the first one makes the optimiser's state."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.fake_gpu.meter import Meter
    from pipeline.backbone.attention.segments import index_tensors
    from pipeline.backbone.lora import adapter_parameters, add_adapter
    from pipeline.encoder.passes.adapted import AdaptedQueryPass
    from pipeline.encoder.passes.plain import Passes
    from pipeline.encoder.passes.select import make_passes
    from pipeline.encoder.student import Student
    from pipeline.optim.batching import parts
    from pipeline.optim.gradients import adamw, update
    from pipeline.train.losses import Batch, add_gradients

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = models.config_of(arguments.model, arguments.layers)
    model = models.fake_model(config, mode)
    meter = Meter()
    with mode, meter, without_values(), real_on_the_host():
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        with torch.device(device.DEVICE):
            student = Student(config.hidden_size, config.hidden_size, COMPRESSION_TOKENS)
        options = pass_params(arguments).model_dump()
        passes: Any = make_passes(model, **options)
        trained = {f"student.{name}": value for name, value in student.named_parameters()}
        if arguments.lora:
            with in_place():
                adapted = add_adapter(model, rank=arguments.lora, alpha=16.0, dropout=0.0, targets="all-linear", seed=0)
            query_pass = make_passes(adapted, **{**options, "frozen_prefix": False}).query_pass
            passes = Passes(AdaptedQueryPass(query_pass, adapted), passes.response_pass)
            trained |= adapter_parameters(adapted)
        optimizer = adamw(trained, rate=1e-3, weight_decay=0.0)
        queries = [
            [1] * arguments.shared + [2 + row] + [5] * (arguments.query - arguments.shared - 1)
            for row in range(arguments.rows)
        ]
        responses = [[7] * arguments.response for _ in range(arguments.rows)]
        each = -(-arguments.rows // arguments.micro_batches)
        sizes = [len(part) for part in parts(range(arguments.rows), each)]
        for _ in range(2):
            meter.reset()
            index_tensors.cache_clear()  # batches of a run differ
            meter.phase("losses")
            losses = torch.zeros(2, dtype=torch.float64, device=device.DEVICE)
            for start in range(0, arguments.rows, each if arguments.queries_apart else arguments.rows):
                rows = slice(start, start + each if arguments.queries_apart else None)
                batch = Batch(queries[rows], responses[rows], torch.zeros(len(queries[rows]), config.hidden_size))
                shared = [len(queries[rows])] if arguments.queries_apart else sizes
                losses += add_gradients(student, passes, batch, shared, "mean", align=0.1, recon=0.1)
            meter.phase("optimizer")
            norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            values = torch.cat([losses, norm[None].to(losses)])
            update(optimizer, values)
            values.to("cpu")  # what a run reads of a step
    return numbers(arguments, meter)


def pass_params(arguments: argparse.Namespace) -> Any:
    """Section `train.passes`: the defaults, but for what the command line sets."""
    from pipeline.train.params import PassParams

    given = {name: getattr(arguments, name) for name in ("attention", "checkpoint_responses", "recompute_gates")}
    return PassParams(**{name: value for name, value in given.items() if value is not None})


def numbers(arguments: argparse.Namespace, meter: Any) -> dict[str, Any]:
    """What the meter counted, beside the plan's estimate."""
    from pipeline.backbone.sizes import sizes_from_config
    from pipeline.optim.flops import step_flops
    from pipeline.optim.memory import LoraSizes, PassTokens, StepSettings, step_memory

    sizes = sizes_from_config(models.config_of(arguments.model, arguments.layers).to_dict())
    if sizes is None:
        raise SystemExit(f"{arguments.model}: the plan knows no sizes of such a model")
    lengths = [(arguments.query, arguments.response)] * arguments.rows
    rows = -(-arguments.rows // arguments.micro_batches)
    tokens = PassTokens(rows, rows * arguments.query, rows * arguments.response)
    settings = StepSettings(
        checkpoint_responses=arguments.checkpoint_responses,
        recompute_gates=0.0 if arguments.checkpoint_responses else pass_params(arguments).recompute_gates,
        recompute_attention=arguments.attention == "segments",
        fused_kernels=True,
        lora=LoraSizes(arguments.lora) if arguments.lora else None,
    )
    seconds = meter.seconds(**H100)
    flops = step_flops(sizes, lengths, compression_tokens=COMPRESSION_TOKENS)
    print(f"launches by phase: {dict(Counter(kernel.phase for kernel in meter.kernels))}")
    print(f"most frequent: {Counter(kernel.name for kernel in meter.kernels).most_common(12)}")
    print(f"roofline of an H100: {seconds:.3f} s for {flops / 1e12:.1f} TFLOP of the model")
    return {
        "kernels": len(meter.kernels),
        "h2d": sum(meter.h2d.values()),
        "d2h": sum(meter.d2h.values()),
        "peak_gb": round(meter.peak / 1e9, 2),
        "estimate_gb": round(step_memory(sizes, tokens, settings).total / 1e9, 2),
        "mfu_ceiling_h100": round(flops / seconds / H100["flops"], 3),
    }


def main() -> None:
    """Walk, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-4b", choices=models.NAMES)
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--rows", type=int, default=16, help="of the step")
    parser.add_argument("--micro-batches", type=int, default=1, help="response passes of the step")
    parser.add_argument("--queries-apart", action="store_true", help="a query pass for each micro-batch")
    parser.add_argument("--query", type=int, default=512, help="tokens of a query")
    parser.add_argument("--response", type=int, default=512, help="tokens of a response")
    parser.add_argument("--shared", type=int, default=3, help="tokens that all queries begin with")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--checkpoint-responses", action="store_true")
    parser.add_argument("--recompute-gates", type=float, help="share of the layers")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters on the query pass; 0: none")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device.load(device.build(LIBRARY))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(walk(arguments)))


if __name__ == "__main__":
    main()
