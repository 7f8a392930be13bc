"""The formula against the operations that torch counts while a step runs."""

from typing import Any

import pytest

from pipeline.backbone.sizes import ModelSizes, sizes_from_config
from pipeline.optim.flops import step_flops
from tests.conftest import tiny_model

LENGTHS = ((30, 70), (50, 20), (40, 41))


def counted(model: Any, passes: Any, thoughts: int = 0) -> int:
    """Operations of one step; attention as matrix products, for torch knows no count of its CPU kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.encoder.student import Student
    from pipeline.train.losses import Batch, loss_sums

    student = Student(32, 24, 4, thoughts)
    queries, responses = ([[(5 * at + row) % 250 for at in range(pair[side])] for row, pair in enumerate(LENGTHS)]
                          for side in (0, 1))  # fmt: skip
    batch = Batch(queries, responses, torch.zeros(len(LENGTHS), 24))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sums = loss_sums(student, passes, batch, "mean")
        torch.autograd.backward(sums.align + sums.recon)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_packed_step(architecture: str) -> None:
    """Attention that is computed again in the backward pass may come on top."""
    from pipeline.encoder.passes.select import make_passes

    model = tiny_model(architecture)
    shape = sizes_from_config(model.config.to_dict())
    assert shape is not None
    expected = step_flops(shape, LENGTHS, compression_tokens=4, thought_tokens=2, width=24)
    rectangles = sum(6 * (query + 6) + (4 + response) ** 2 for query, response in LENGTHS)
    again = 4 * shape.layers * shape.queries * rectangles
    assert 0.999 * expected <= counted(model, make_passes(model), thoughts=2) <= 1.001 * (expected + again)


def test_a_step_with_adapters_needs_gradients_through_the_query() -> None:
    from pipeline.backbone.lora import add_adapter
    from pipeline.encoder.passes.adapted import AdaptedQueryPass
    from pipeline.encoder.passes.plain import Passes, PlainQueryPass, PlainResponsePass

    model = tiny_model("llama")
    adapted = add_adapter(model, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    shape = sizes_from_config(model.config.to_dict())
    assert shape is not None
    longest = [(max(query for query, _ in LENGTHS), max(response for _, response in LENGTHS))] * len(LENGTHS)
    padded = step_flops(shape, longest, compression_tokens=4, width=24, adapter_parameters=adapters)
    # The padded passes project the soft prompts through the output head too.
    head = 4 * len(LENGTHS) * 4 * shape.hidden * shape.vocabulary
    passes = Passes(AdaptedQueryPass(PlainQueryPass(adapted), adapted), PlainResponsePass(model))
    assert counted(adapted, passes) == pytest.approx(padded + head, rel=0.001)


def test_a_long_prefix_costs_its_forward_pass() -> None:
    shape = ModelSizes(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=3, vocabulary=10, tied=True)
    short, long = (step_flops(shape, [(query, 5)], compression_tokens=1) for query in (1, 1001))
    linear = 1000 * 2 * 2 * shape.layer_parameters()
    rectangles = 4 * 2 * 6 * (1001**2 - 1 + 3 * 1000)
    assert long - short == linear + rectangles
