"""The estimate against what torch reports: bytes that autograd keeps, and the allocator's peak over a whole step."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.backbone.sizes import ModelSizes, sizes_from_config
from pipeline.optim.memory import (
    OVERHEAD,
    QUANTIZED,
    LoraSizes,
    PassTokens,
    StepMemory,
    StepSettings,
    chunk_positions,
    kv_bytes,
    largest,
    layer_bytes,
    moments,
    prefix_bytes,
    query_bytes,
    response_bytes,
    step_memory,
    trained_parameters,
    weight_bytes,
)
from tests.conftest import tiny_model

TINY = ModelSizes(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=3, vocabulary=10, tied=True)
N, CHUNK = 5, 32
QUERIES, RESPONSES = (30, 50, 40), (70, 45, 60)


def row_ids(lengths: tuple[int, ...], vocabulary: int) -> list[list[int]]:
    return [[(7 * at + length) % vocabulary for at in range(length)] for length in lengths]


def kept_bytes(model: Any, run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and buffers left out."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def peak_bytes(run: Callable[[], Any], trace: Path) -> int:
    """The most that torch's allocator held at once for `run`, on top of what was there."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


Switches = dict[str, bool]
NAMES = ("packed", "frozen_prefix", "fused_cross_entropy", "checkpoint_responses")
EVERY = [dict(zip(NAMES, values, strict=True)) for values in product((True, False), repeat=len(NAMES))]
FAST, LEAN, PLAIN = EVERY[1], EVERY[0], EVERY[-1]


def name_of(switches: Switches) -> str:
    return "+".join(name for name, on in switches.items() if on) or "plain"


def tokens_of(packed: bool) -> PassTokens:
    if packed:
        return PassTokens(len(QUERIES), sum(QUERIES), sum(RESPONSES))
    return PassTokens.full(len(QUERIES), max(QUERIES), max(RESPONSES))


def settings_of(dtype: Any, switches: Switches) -> StepSettings:
    settings = StepSettings(dtype=dtype, compression_tokens=N, chunk=CHUNK, recompute_attention=switches["packed"])
    return replace(settings, **cast(Any, switches))


def check_kept(model: Any, dtype: str, switches: Switches, within: float) -> None:
    import torch

    from pipeline.encoder.passes.select import make_passes

    shape = sizes_from_config(model.config.to_dict())
    assert shape is not None
    tokens, settings = tokens_of(switches["packed"]), settings_of(dtype, switches)
    passes = make_passes(model, **cast(Any, switches), chunk=CHUNK)
    new = torch.randn(N, shape.hidden, requires_grad=True)
    soft = torch.randn(len(QUERIES), N, shape.hidden, requires_grad=True)
    queries, responses = (row_ids(lengths, shape.vocabulary) for lengths in (QUERIES, RESPONSES))
    found = kept_bytes(model, lambda: passes.query_pass(queries, new, N))
    estimate = query_bytes(shape, tokens, settings) + prefix_bytes(shape, tokens, settings)
    assert estimate == pytest.approx(found, rel=within)
    found = kept_bytes(model, lambda: passes.response_pass(soft, responses))
    # The gradient that the fused cross-entropy computes at once; the log-probabilities that the plain one keeps.
    logits = settings.number * shape.hidden if switches["fused_cross_entropy"] else 4 * shape.vocabulary
    padding = 0 if any(switches[name] for name in NAMES if name != "frozen_prefix") else tokens.response
    estimate = response_bytes(shape, tokens, settings) + max(padding, sum(RESPONSES)) * logits
    assert estimate == pytest.approx(found, rel=within)


@pytest.mark.parametrize("switches", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_bytes_that_autograd_keeps(architecture: str, dtype: str, switches: Switches) -> None:
    """With checkpoints, what is kept once and not by each of the three layers weighs more. The padded cache of sliding
    windows (16 tokens here) forgets what the estimate counts.
    """
    import torch

    within = 0.1 if switches["checkpoint_responses"] else 0.05
    if architecture == "gemma3" and switches["frozen_prefix"] and not switches["packed"]:
        within = 0.4
    check_kept(tiny_model(architecture).to(getattr(torch, dtype)), dtype, switches, within)


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("switches", [FAST, PLAIN], ids=name_of)
def test_bytes_that_autograd_keeps_of_a_real_model(small_lm: Path, switches: Switches) -> None:
    from pipeline.backbone.loading import BackboneParams, load_backbone

    model = load_backbone(BackboneParams(name=str(small_lm), dtype="float32"))
    check_kept(model, "float32", switches, 0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_that_autograd_keeps_of_adapters(dtype: Any) -> None:
    import torch

    from pipeline.backbone.lora import add_adapter
    from pipeline.encoder.passes.plain import plain_passes

    model = tiny_model("llama").to(getattr(torch, dtype))
    adapted = add_adapter(model, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    shape = sizes_from_config(model.config.to_dict())
    assert shape is not None
    settings = StepSettings(dtype=dtype, compression_tokens=N, packed=False, lora=LoraSizes(4))
    adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    without = StepSettings(dtype=dtype, compression_tokens=N)
    assert trained_parameters(shape, settings) - trained_parameters(shape, without) == adapters
    new = torch.randn(N, shape.hidden, requires_grad=True)
    passes = plain_passes(adapted)
    found = kept_bytes(adapted, lambda: passes.query_pass(row_ids(QUERIES, shape.vocabulary), new, N))
    assert query_bytes(shape, tokens_of(False), settings) == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("vocabulary", [260, 4000])
@pytest.mark.parametrize("switches", [FAST, LEAN, PLAIN], ids=name_of)
def test_the_peak_of_a_step(switches: Switches, vocabulary: int, tmp_path: Path) -> None:
    """With few words the backward pass holds most, with many the logits."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.encoder.passes.select import make_passes
    from pipeline.encoder.student import Student
    from pipeline.train.losses import Batch, loss_sums

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    shape = sizes_from_config(config.to_dict())
    assert shape is not None
    student, passes = Student(64, 64, N), make_passes(model, **cast(Any, switches), chunk=CHUNK)
    queries, responses = (row_ids(lengths, vocabulary) for lengths in (QUERIES, RESPONSES))
    batch = Batch(queries, responses, torch.zeros(len(QUERIES), 64))

    def step() -> None:
        sums = loss_sums(student, passes, batch, "mean")
        torch.autograd.backward(sums.align + sums.recon)

    estimate = step_memory(shape, tokens_of(switches["packed"]), settings_of("float32", switches))
    # In the first backward pass the gradients appear at the end; the model is there already.
    there = estimate.weights + estimate.optimizer
    assert estimate.total - there == pytest.approx(peak_bytes(step, tmp_path / "trace.json"), rel=0.15)


def test_the_chunk_is_that_of_the_cross_entropy() -> None:
    import torch

    from pipeline.backbone.output_head import chunk_rows

    for vocabulary in (260, 151_936, 10_000_000):
        assert chunk_positions(vocabulary) == chunk_rows(vocabulary, torch.device("cuda"))


def test_the_parts_by_hand() -> None:
    settings = StepSettings(compression_tokens=2, thought_tokens=1, chunk=3)
    tokens = PassTokens.full(3, 7, 5)
    assert tokens == PassTokens(3, 21, 15)
    layer = 2 * 4 * (4 + 1) + 2 * 2 * (6 + 3) + 4 * 2 + 3 * 2 * 8
    assert layer_bytes(TINY, settings) == layer
    assert kv_bytes(TINY, "bfloat16") == 2 * 2 * 3 * 2
    once = 4 * (4 + 1) + 2 * 2 * 3
    assert query_bytes(TINY, tokens, settings) == 9 * (2 * layer + once + 2 * 2 * (7 + 3))
    assert prefix_bytes(TINY, tokens, settings) == 21 * kv_bytes(TINY, "bfloat16")
    assert response_bytes(TINY, tokens, settings) == 21 * (2 * layer + once)
    parameters = 3 * 4 + (4 * 4 + 4) + (4 * 4 + 4)
    assert trained_parameters(TINY, settings) == parameters
    memory = moments(TINY, tokens, settings)[2]
    assert memory == StepMemory(
        weights=2 * TINY.parameters(),
        optimizer=16 * parameters,
        prefix=prefix_bytes(TINY, tokens, settings),
        activations=query_bytes(TINY, tokens, settings) + response_bytes(TINY, tokens, settings),
        logits=3 * 8 * 10 + 3 * 15 * 2 * 4,
    )
    assert memory.total == sum(
        (memory.weights, memory.optimizer, memory.prefix, memory.activations, memory.logits, memory.workspace)
    )


def test_checkpointed_responses_keep_the_inputs_of_layers() -> None:
    shape = TINY.model_copy(update={"layers": 40, "vocabulary": 2})
    tokens, settings = PassTokens.full(1, 1, 98), StepSettings(compression_tokens=2)
    lean = StepSettings(compression_tokens=2, checkpoint_responses=True)
    assert response_bytes(shape, tokens, lean) == 100 * (40 * 2 * 4 + 4 * 5 + 2 * 2 * 3)
    [peak, lean_peak] = [step_memory(shape, tokens, how) for how in (settings, lean)]
    assert lean_peak.workspace == peak.workspace + 100 * layer_bytes(shape, settings)
    assert lean_peak.total < 0.3 * peak.total


def test_gates_that_are_computed_again_keep_their_input() -> None:
    """Of 4 numbers, in place of two factors of 8; in one of two layers, for 2 soft prompts and 5 tokens of 3 rows."""
    tokens, kept = PassTokens.full(3, 7, 5), StepSettings(compression_tokens=2, fused_kernels=True)
    again = replace(kept, recompute_gates=0.5)
    assert response_bytes(TINY, tokens, kept) - response_bytes(TINY, tokens, again) == 21 * 2 * (2 * 8 - 4)
    assert query_bytes(TINY, tokens, kept) == query_bytes(TINY, tokens, again)
    plain = replace(again, fused_kernels=False)
    assert response_bytes(TINY, tokens, plain) == response_bytes(TINY, tokens, replace(plain, recompute_gates=0.0))


def test_quantised_and_shared_weights() -> None:
    layers, embeddings = 2 * TINY.layer_parameters(), TINY.embedding_parameters()
    assert weight_bytes(TINY, StepSettings(quantize="8bit")) == layers + 2 * embeddings
    assert weight_bytes(TINY, StepSettings(quantize="4bit")) == round(layers * QUANTIZED["4bit"] + 2 * embeddings)
    assert QUANTIZED["4bit"] == pytest.approx(0.516, abs=1e-3)
    shared = weight_bytes(TINY, StepSettings(shards=4))
    assert shared == 2 * layers // 4 + 2 * embeddings + 2 * 2 * TINY.layer_parameters()
    kept = {kind: layer_bytes(TINY, StepSettings(quantize=kind)) for kind in (None, "4bit", "8bit")}
    assert kept["4bit"] == kept[None]
    assert kept["8bit"] == kept[None] + 2 * (2 * 4 + 6 + 8)


def test_attention_that_is_computed_again_keeps_less() -> None:
    tokens, settings = PassTokens.full(3, 50, 5), StepSettings()
    again = StepSettings(recompute_attention=True)
    assert layer_bytes(TINY, settings) - layer_bytes(TINY, again) == 2 * 6 + 4 * 2
    assert moments(TINY, tokens, settings)[1].prefix == 2 * moments(TINY, tokens, again)[1].prefix


def test_adapters_end_the_frozen_prefix() -> None:
    tokens, settings = PassTokens.full(2, 50, 5), StepSettings(lora=LoraSizes(1, ("q_proj", "v_proj")))
    assert prefix_bytes(TINY, tokens, settings) == 0
    assert query_bytes(TINY, tokens, settings) > 4 * query_bytes(TINY, tokens, StepSettings())
    adapters = trained_parameters(TINY, settings) - trained_parameters(TINY, StepSettings())
    assert adapters == 2 * ((4 + 6) + (4 + 3))


def test_the_costliest_pass_of_a_budget_is_all_responses() -> None:
    worst = PassTokens.worst(1000, most_rows=64, max_query=100, max_response=180, extra=20)
    assert worst == PassTokens(4, 200, 720)
    assert PassTokens.worst(1000, most_rows=3, max_query=100, max_response=180, extra=20) == PassTokens(3, 300, 540)
    one_row = PassTokens(1, 100, 180)
    assert PassTokens.worst(50, most_rows=64, max_query=100, max_response=180, extra=20) == one_row


def test_the_largest_count_that_fits() -> None:
    def cost(count: int) -> StepMemory:
        return StepMemory(weights=1000, optimizer=0, activations=10 * count)

    assert largest(cost, OVERHEAD + 1055, end=100) == 5
    assert largest(cost, OVERHEAD + 1050, end=100) == 5
    assert largest(cost, OVERHEAD + 9999, end=100) == 100
    assert largest(cost, OVERHEAD + 1009, end=100) is None
