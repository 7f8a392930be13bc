"""What only a real GPU can tell, in under ten minutes on one: random weights of the real shapes, no vLLM, no hub.

    python bench/gpu.py            on a machine with a GPU
    python bench/gpu.py --tiny     all of it on a CPU in seconds, with tiny models

Prints a line a finding; the last line is JSON. A part that fails is reported and the others go on.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from bench.fake_gpu.models import config_of
from pipeline.backbone.sizes import sizes_from_config
from pipeline.encoder.passes.prompt_reader import prompt_reader
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import new_student
from pipeline.optim.flops import step_flops
from pipeline.optim.gpus import GPUS
from pipeline.optim.memory import PassTokens, StepSettings, step_memory
from pipeline.train.losses import Batch, loss_sums
from pipeline.train.params import PassParams

TOKENS = 10
# Of an H100 or H200; of another GPU the utilisation is relative to it.
PEAK_FLOPS = GPUS["H100"].flops
SMALL_CARD = 23.6 * 2**30
TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=300,
)  # fmt: skip


class Machine:
    """The device, the sizes of the run, and what was found."""

    def __init__(self, tiny: bool) -> None:
        """Raises SystemExit without a GPU, unless `tiny`."""
        if not tiny and not torch.cuda.is_available():
            sys.exit("error: torch finds no GPU; --tiny tries everything on the CPU")
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda:0")
        self.random = np.random.default_rng(0)
        self.found: dict[str, Any] = {
            "torch": torch.__version__,
            "gpu": "none" if tiny else torch.cuda.get_device_name(),
            "failed": [],
        }
        self._started = time.monotonic()

    def report(self, key: str, value: Any) -> None:
        """Keep a finding and print it."""
        self.found[key] = value
        print(f"[{time.monotonic() - self._started:5.0f} s] {key}: {value}", flush=True)

    def run(self, name: str, part: Callable[["Machine"], None]) -> None:
        """One part of the benchmark; what it holds is freed afterwards."""
        try:
            part(self)
        except Exception as error:  # one broken part must not hide the others
            self.found["failed"].append(name)
            self.report(name, f"FAILED {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=-4)
        if not self.tiny:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        if not self.tiny:
            torch.cuda.synchronize()

    def model(self, name: str, layers: int | None = None, **changes: Any) -> Any:
        """A frozen causal LM with random weights in bfloat16."""
        from transformers import AutoModelForCausalLM

        config = config_of(name, layers)
        config.update({**(TINY if self.tiny else {}), **changes})
        if self.tiny and getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval().requires_grad_(False)

    def batch(self, rows: int, width: int, length: int | None = None) -> Batch:
        """Rows of the lengths that Tulu 3 has (about 80 and 370 tokens), or all of one length."""
        queries = [length or int(size) for size in np.clip(self.random.lognormal(4.4, 0.9, rows), 12, 512)]
        responses = [length or int(size) for size in np.clip(self.random.normal(370, 130, rows), 20, 501)]
        if self.tiny:
            queries, responses = [4 + row for row in range(rows)], [5 + row for row in range(rows)]
        targets = torch.from_numpy(self.random.normal(size=(rows, width)).astype(np.float32))
        return Batch(
            [[1, 2, 3, *self._ids(size - 3)] for size in queries], [self._ids(size) for size in responses], targets
        )

    def _ids(self, count: int) -> list[int]:
        return [int(number) for number in self.random.integers(5, 290 if self.tiny else 150_000, count)]

    def seconds(self, work: Callable[[], object], times: int = 3) -> float:
        """Of one call, after a first one that is not counted."""
        work()
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - started) / times


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """What the pipeline logs inside the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def passes_chosen(machine: Machine) -> None:
    """Which passes each architecture gets, and what is refused with which difference."""
    for name, changes in (("qwen3-4b", {}), ("llama-3.2-1b", {}), ("gemma3-1b", {"sliding_window": 4})):
        model = machine.model(name, layers=4, **changes)
        with log_lines() as lines:
            passes = make_passes(model)
        machine.report(f"passes {name}", {"query pass": type(passes.query_pass).__name__, "log": lines})


def training_step(
    machine: Machine, name: str, rows: int, label: str, *, length: int | None = None, **options: Any
) -> None:
    """Milliseconds of each part of a step, utilisation, and peak memory beside the plan's estimate."""
    model = machine.model(name)
    sizes = sizes_from_config(model.config.to_dict())
    assert sizes is not None
    passes = make_passes(model, **PassParams(**options).model_dump())
    student = new_student(model, model.config.hidden_size, compression_tokens=TOKENS, thought_tokens=0, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    batches = [machine.batch(rows, student.width, length) for _ in range(6)]
    parts, flops, seconds = np.zeros(3), 0, 0.0
    for at, batch in enumerate(batches):
        if at == 2 and not machine.tiny:
            torch.cuda.reset_peak_memory_stats()
        clock = [_now(machine)]
        sums = loss_sums(student, passes, batch, "mean")
        clock.append(_now(machine))
        (sums.align / sums.rows + sums.recon / sums.tokens).backward()  # type: ignore[no-untyped-call]
        clock.append(_now(machine))
        optimizer.step()
        optimizer.zero_grad()
        clock.append(_now(machine))
        if at >= 2:  # the first ones compile
            parts += np.diff(clock)
            seconds += clock[-1] - clock[0]
            flops += step_flops(sizes, _lengths(batch), compression_tokens=TOKENS)
    most = PassTokens(rows, max(_sum(b.query_ids) for b in batches), max(_sum(b.response_ids) for b in batches))
    again = options.get("checkpoint_responses", False)
    gates = 0.0 if again else PassParams(**options).recompute_gates
    settings = StepSettings(checkpoint_responses=again, fused_kernels=True, recompute_gates=gates)
    machine.report(
        label,
        {
            "ms forward, backward, optimizer": [round(1e3 * float(part) / 4, 1) for part in parts],
            "TFLOP/s": round(flops / seconds / 1e12, 1),
            "mfu": round(flops / seconds / PEAK_FLOPS, 3),
            "peak_gb": None if machine.tiny else round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "estimate_gb": round(step_memory(sizes, most, settings).total / 1e9, 2),
        },
    )


def _now(machine: Machine) -> float:
    machine.wait()
    return time.perf_counter()


def _lengths(batch: Batch) -> list[tuple[int, int]]:
    return [(len(query), len(response)) for query, response in zip(batch.query_ids, batch.response_ids, strict=True)]


def _sum(rows: Sequence[Sequence[int]]) -> int:
    return sum(len(ids) for ids in rows)


def launches(machine: Machine) -> None:
    """Kernels of a micro-batch as the profiler counts them, and how often the host waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    model = machine.model("qwen3-4b")
    passes = make_passes(model)
    student = new_student(model, model.config.hidden_size, compression_tokens=TOKENS, thought_tokens=0, seed=0)
    batches = [machine.batch(2 if machine.tiny else 16, student.width) for _ in range(3)]

    def step(batch: Batch) -> None:
        sums = loss_sums(student, passes, batch, "mean")
        (sums.align + sums.recon).backward()  # type: ignore[no-untyped-call]

    step(batches[0])
    if machine.tiny:
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(batches[1])
    torch.cuda.set_sync_debug_mode("default")
    machine.report("host waits a micro-batch", sum("synchroniz" in str(found.message) for found in caught))
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(batches[2])
        machine.wait()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = [event for event in events if event.self_device_time_total > 0]
    machine.report("kernels a micro-batch", sum(event.count for event in kernels))
    machine.report(
        "slowest kernels, ms and count",
        [(event.key[:60], round(event.self_device_time_total / 1e3, 1), event.count) for event in kernels[:12]],
    )


def small_card(machine: Machine) -> None:
    """The 8B backbone within the memory of a 24 GB card."""
    if not machine.tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(SMALL_CARD / total)
    try:
        training_step(machine, "qwen3-8b", 1, "train 8B, a row of 512 + 512, 23.6 GiB", length=512)
    finally:
        if not machine.tiny:
            torch.cuda.set_per_process_memory_fraction(1.0)


def reading(machine: Machine) -> None:
    """Tokens a second of the encoder's reading and of a teacher's, long texts and short ones."""
    from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
    from pipeline.embed.teachers.pooling import pooled_states
    from pipeline.embed.teachers.template import Tokens

    model = machine.model("qwen3-4b")
    reader = prompt_reader(model)
    tokens = torch.zeros(TOKENS, model.config.hidden_size, device=machine.device)
    rows = machine.batch(3 if machine.tiny else 140, 4).query_ids

    def read() -> None:
        with torch.inference_mode():
            reader.read(reader.begin([1, 2, 3]), rows, tokens, TOKENS)

    machine.report("encoder reads, tokens/s", round((_sum(rows) + TOKENS * len(rows)) / machine.seconds(read)))
    body = model.get_decoder()
    make_bidirectional(body)
    check_bidirectional(body, "random 4B")
    for count, length in ((128, 380), (64, 20)):
        texts = [Tokens([7] * length, [1] * length) for _ in range(2 if machine.tiny else count)]

        def pool(texts: list[Tokens] = texts) -> None:
            with torch.inference_mode():
                pooled_states(body, texts).cpu()

        speed = round(len(texts) * length / machine.seconds(pool))
        machine.report(f"teacher reads {count} texts of {length} tokens, tokens/s", speed)


_TRAIN: dict[str, Any] = dict(
    compression_tokens=TOKENS, thought_tokens=0, template="raw", max_query_tokens=512, max_response_tokens=512,
    align_weight=1.0, recon_weight=1.0, align_reduction="mean", warm_start={"enabled": True, "rows": None},
    learning_rate=1e-5, weight_decay=0.0, warmup_steps=2, schedule_steps=100, epochs=9, batch_size=8,
    micro_batch_size=4, max_grad_norm=1.0, heldout={"every": 5, "rows": 8}, checkpoint_every=5, seed=0,
)  # fmt: skip


def trainer(machine: Machine) -> None:
    """The whole training run: closed-form start, steps, held-out scores, checkpoint, and a resumed run."""
    from accelerate import Accelerator

    from pipeline.core.config import validate
    from pipeline.train.build import start_student
    from pipeline.train.data import TrainingRows
    from pipeline.train.params import TrainParams
    from pipeline.train.trainer import Trainer
    from pipeline.train.validation import Validation

    model = machine.model("qwen3-0.6b")
    width = model.config.hidden_size

    def rows(count: int) -> TrainingRows:
        batch = machine.batch(count, width)
        return TrainingRows(
            [str(row) for row in range(count)], batch.query_ids, batch.response_ids, batch.targets.numpy()
        )

    train, heldout = rows(40 if machine.tiny else 600), rows(8 if machine.tiny else 64)
    passes = make_passes(model)
    with tempfile.TemporaryDirectory() as folder:
        for label, stop in (("trainer, 10 steps", 10), ("trainer, resumed to 14", 14)):
            params = validate({**_TRAIN, "stop_after_steps": stop}, TrainParams, where="bench/gpu.py")
            student = new_student(model, width, compression_tokens=TOKENS, thought_tokens=0, seed=0)
            validation = Validation(heldout)
            accelerator = Accelerator(cpu=machine.tiny)
            run = Trainer(student, passes, train, params, accelerator, validation, {}, Path(folder) / "checkpoint")
            resumed = run.resume()
            if not resumed:
                start_student(run, model, [1, 2, 3])
            run.run()
            machine.report(label, {"resumed": resumed, "last": run.curve[-1], "held out": validation.curve[-1]})


def main() -> None:
    """Every part, and the findings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: does everything run?")
    machine = Machine(parser.parse_args().tiny)
    rows = 2 if machine.tiny else 16
    machine.run("passes", passes_chosen)
    machine.run("train 4B", lambda m: training_step(m, "qwen3-4b", rows, f"train 4B, {rows} rows"))
    machine.run("launches", launches)
    machine.run("train 0.6B", lambda m: training_step(m, "qwen3-0.6b", rows, f"train 0.6B, {rows} rows"))
    machine.run("train 8B", lambda m: training_step(m, "qwen3-8b", rows // 2, f"train 8B, {rows // 2} rows"))
    machine.run("small card", small_card)
    machine.run("reading", reading)
    machine.run("trainer", trainer)
    print(json.dumps(machine.found, default=str))
    sys.exit(bool(machine.found["failed"]))


if __name__ == "__main__":
    main()
