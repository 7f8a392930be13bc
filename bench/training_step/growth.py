"""How our cost grows: seconds and memory a sample against the tokens of a batch, and against the vocabulary.

    .venv/bin/python -m bench.training_step.growth --dtype bf16 --device cpu [--quick]

One process, one setting after the other, the highest resident set forgotten in between. Random models have SmolLM2's
shape and another vocabulary; their batch is the same rows, ids taken modulo the vocabulary.
"""

import argparse
import gc
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common import BACKBONE
from bench.reference.meter import Meter
from bench.reference.serving import DTYPES
from bench.training_step.workload import Rows, load
from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import new_student
from pipeline.train.losses import Batch, loss_sums

BUDGETS = (512, 1024, 2048, 4096)
VOCABULARIES = (8_192, 32_768, 65_536, 151_936)
LOADED = {"bf16": "bfloat16", "fp32": "float32"}


def packed_by_budget(rows: Rows, budget: int) -> list[Rows]:
    """Rows in their order, as many a batch as the budget of tokens takes, at least one."""
    batches: list[Rows] = []
    held = math.inf
    for query, response in zip(rows.query_ids, rows.response_ids, strict=True):
        size = len(query) + len(response)
        if held + size > budget:
            batches.append(Rows([], []))
            held = 0
        batches[-1].query_ids.append(query)
        batches[-1].response_ids.append(response)
        held += size
    return batches


def merged(batches: Sequence[Rows]) -> Rows:
    """All rows as one batch."""
    return Rows(*([ids for batch in batches for ids in getattr(batch, name)] for name in ("query_ids", "response_ids")))


def measure(backbone: Any, batches: Sequence[Rows], device: str, repeats: int) -> dict[str, float]:
    """Median seconds a sample, and peak MiB beyond the model, of forward and backward over `batches`."""
    vocabulary, width = backbone.get_input_embeddings().weight.shape
    student = new_student(backbone, width, compression_tokens=10, thought_tokens=0, seed=0)
    passes = make_passes(backbone)
    fitting = [_within(batch, vocabulary) for batch in batches]
    largest = max(fitting, key=lambda rows: rows.tokens)
    _forward_backward(student, passes, largest)
    gc.collect()
    meter = Meter(device)
    meter.forget()
    seconds = []
    for _ in range(repeats):
        meter.start()
        for rows in fitting:
            _forward_backward(student, passes, rows)
        seconds.append(meter.stop()["seconds"])
    samples = sum(len(rows.query_ids) for rows in fitting)
    return {
        "seconds_per_sample": statistics.median(seconds) / samples,
        "beyond_mib": meter.memory()["beyond"],
        "largest_batch_tokens": largest.tokens,
        "batches": len(fitting),
    }


def _within(rows: Rows, vocabulary: int) -> Rows:
    return Rows(
        *([[token % vocabulary for token in ids] for ids in part] for part in (rows.query_ids, rows.response_ids))
    )


def _forward_backward(student: Any, passes: Any, rows: Rows) -> None:
    targets = torch.zeros(len(rows.query_ids), student.width, device=student.tokens.device)
    sums = loss_sums(student, passes, Batch(rows.query_ids, rows.response_ids, targets), "mean")
    torch.autograd.backward(sums.align / sums.rows + sums.recon / sums.tokens)
    student.zero_grad()


def random_backbone(vocabulary: int, dtype: str, device: str) -> Any:
    """A model of the backbone's shape with random weights and another vocabulary."""
    config = AutoConfig.from_pretrained(BACKBONE, vocab_size=vocabulary)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.to(device).eval().requires_grad_(False)


def against_budget(batches: Sequence[Rows], dtype: str, device: str, repeats: int, budgets: Sequence[int]) -> Any:
    """One line a token budget."""
    backbone = load_backbone(BackboneParams(name=str(BACKBONE), dtype=LOADED[dtype]), device)  # type: ignore[arg-type]
    rows = merged(batches)
    return [
        {"budget": budget, **measure(backbone, packed_by_budget(rows, budget), device, repeats)} for budget in budgets
    ]


def against_vocabulary(
    batches: Sequence[Rows], dtype: str, device: str, repeats: int, vocabularies: Sequence[int]
) -> Any:
    """One line a vocabulary size."""
    return [
        {"vocabulary": size, **measure(random_backbone(size, dtype, device), batches[:1], device, repeats)}
        for size in vocabularies
    ]


def main() -> None:
    """Measure both and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--dtype", choices=[*LOADED], required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    batches = load(settings.batches)
    budgets, sizes, repeats = (BUDGETS[1::2], VOCABULARIES[::3], 1) if settings.quick else (BUDGETS, VOCABULARIES, 2)
    shared = (settings.dtype, settings.device, repeats)
    found = {
        "tokens": against_budget(batches, *shared, budgets),
        "vocabulary": against_vocabulary(batches, *shared, sizes),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
