"""Every combination of options computes what the plain passes do: loss and all trained gradients, in float64."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.encoder.passes.plain import Passes, PlainQueryPass, PlainResponsePass, Pooled, plain_passes
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import Student, new_student
from tests.conftest import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.encoder.passes.exact_models import configured

ARCHITECTURES = ["llama", "qwen3", "gemma3"]
OPTIONS = ("packed", "frozen_prefix", "fused_cross_entropy", "checkpoint_responses")
ON_OR_OFF = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product([True, False], repeat=4)]

Rows = Sequence[Sequence[int]]
# Lengths around gemma3's window of 16, one token, and a row of the longest that the models take.
CASES: dict[str, tuple[Rows, Rows]] = {
    "mixed lengths": ([[5, 6, 7], list(range(10, 50)), [9]], [[4, 5, 6, 2], [7, 2], list(range(60, 100))]),
    "one token each": ([[5], [6], [7]], [[2], [3], [4]]),
    "a batch of one": ([list(range(20, 45))], [list(range(50, 80))]),
    "the same prompt twice": ([[8, 9, 10], [8, 9, 10]], [[4, 2], [5, 6, 2]]),
    "a shared beginning": (
        [[*range(30, 55), 5], [*range(30, 55), 5, 6], [*range(30, 55), *range(60, 90)]],
        [[3, 2], [4, 2], [5] * 30],
    ),
}


def double(architecture: str) -> Any:
    model = tiny_model(architecture)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.double()
    # Rotary frequencies are computed in float32 whatever the weights are.
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    return model


def trained(model: Any, thoughts: int, tokens: int) -> Student:
    return new_student(model, 5, compression_tokens=tokens, thought_tokens=thoughts, seed=0).to(
        model.get_input_embeddings().weight.dtype
    )


def step(passes: Passes, student: Student, queries: Rows, responses: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the paper, with a mean over a query's end and the tokens, and the gradients of everything trained."""
    student.zero_grad()
    pooled = Pooled([slice(max(0, len(ids) - 2), len(ids)) for ids in queries], with_tokens=True)
    states = passes.query_pass(queries, student.tokens, student.compression_tokens, pooled)
    soft_prompts, embeddings = student(states)
    recon, count = passes.response_pass(soft_prompts, responses)
    assert count == sum(map(len, responses))
    loss = recon / count + embeddings.square().sum()
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in student.named_parameters()}


def assert_equal_steps(model: Any, passes: Passes, case: tuple[Rows, Rows], tolerance: float, **tokens: int) -> None:
    student = trained(model, tokens.get("thoughts", 2), tokens.get("tokens", 3))
    expected, gradients = step(plain_passes(model), student, *case)
    found, others = step(passes, student, *case)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", ON_OR_OFF, ids=lambda on: "+".join(name for name, is_on in on.items() if is_on))
def test_switches_change_nothing(architecture: str, options: dict[str, bool], caplog: pytest.LogCaptureFixture) -> None:
    model = double(architecture)
    passes = make_passes(model, **options)
    assert "cannot" not in caplog.text
    assert passes.padded is not options["packed"]
    for case in CASES.values():
        assert_equal_steps(model, passes, case, 1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpoint_responses", [False, True])
def test_the_longest_rows_that_the_backbone_takes(architecture: str, checkpoint_responses: bool) -> None:
    model = double(architecture)
    longest = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(3, 250, (longest - 5,), generator=generator).tolist()
    response = torch.randint(3, 250, (longest - 3,), generator=generator).tolist()
    passes = make_passes(model, checkpoint_responses=checkpoint_responses)
    assert_equal_steps(model, passes, ([query, [4, 5]], [[2], response]), 1e-9)


@pytest.mark.parametrize(("tokens", "thoughts"), [(1, 0), (1, 20), (100, 0)])
def test_numbers_of_new_tokens(tokens: int, thoughts: int) -> None:
    model = double("qwen3")
    assert_equal_steps(model, make_passes(model), CASES["mixed lengths"], 1e-9, tokens=tokens, thoughts=thoughts)


def test_a_chat_template_is_a_shared_beginning() -> None:
    from pipeline.backbone.prompting import PromptFormatter

    model = double("qwen3")
    formatter = PromptFormatter(tiny_tokenizer(CHAT_TEMPLATE), "chat", 64)
    prompts = [prompt.token_ids for prompt in formatter.batch(["why?", "who is it", ""])]
    assert_equal_steps(model, make_passes(model), (prompts, [[4, 2]] * 3), 1e-9)
    assert_equal_steps(model, make_passes(model, share_prefix=False), (prompts, [[4, 2]] * 3), 1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float32(architecture: str) -> None:
    model = tiny_model(architecture)
    for options in ({}, {"checkpoint_responses": True}, {"packed": False}):
        assert_equal_steps(model, make_passes(model, **options), CASES["mixed lengths"], 1e-4)


def test_all_off_is_the_plain_version() -> None:
    passes = make_passes(tiny_model(), **dict.fromkeys(OPTIONS, False))
    assert isinstance(passes.query_pass, PlainQueryPass)
    assert isinstance(passes.response_pass, PlainResponsePass)


def test_a_head_that_does_more_falls_back_to_its_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    model = double("llama")
    model.lm_head.register_forward_hook(lambda _module, _args, output: output.square())
    passes = make_passes(model)
    assert "does more than this code knows" in caplog.text
    assert not passes.padded
    assert_equal_steps(model, passes, CASES["mixed lengths"], 1e-9)


def test_an_architecture_outside_the_attention_interface_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=260, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    model = GPTJForCausalLM(GPTJConfig(**sizes)).eval().double().requires_grad_(False)
    passes = make_passes(model)
    assert passes.padded
    assert "batches are padded" in caplog.text
    assert_equal_steps(model, passes, CASES["mixed lengths"], 1e-9)


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("phimoe", {"sliding_window": 40, "num_local_experts": 4}, "does not tell its attention of its sliding window"),
        ("gpt_oss", {"num_local_experts": 4}, "its attention depends on s_aux"),
    ],
    ids=["a window that only the mask knows", "attention sinks"],
)
def test_an_attention_that_does_more_is_padded(
    architecture: str, settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe of a few tokens sees neither a long window nor, in half precision, small sinks."""
    model = configured(architecture, **settings)
    passes = make_passes(model)
    assert passes.padded
    assert reason in caplog.text
    assert_equal_steps(model, passes, ([[5] * 9, list(range(10, 80))], [[4, 5], list(range(60, 125))]), 1e-4)


def test_a_backbone_that_is_trained_freezes_no_prefix(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = double("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    gradients = []
    for passes in (plain_passes(model), make_passes(model)):
        weight.grad = None
        passes.query_pass(CASES["mixed lengths"][0], torch.ones(2, 32).double(), 1).square().sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert "no prefix is frozen" in caplog.text


def test_the_backbone_generates_as_before() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)
    step(make_passes(model, checkpoint_responses=True), trained(model, 2, 3), *CASES["mixed lengths"])
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2), before)
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("backbone", ["small_lm", "second_backbone"])
def test_a_real_backbone_is_packed_in_every_precision(
    backbone: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.backbone.loading import BackboneParams, DType, load_backbone

    folder = str(request.getfixturevalue(backbone))
    precisions: list[DType] = ["bfloat16", "float32"]
    for dtype in precisions:
        model = load_backbone(BackboneParams(name=folder, dtype=dtype))
        passes = make_passes(model)
        assert not passes.padded
    assert_equal_steps(model, passes, CASES["a shared beginning"], 1e-4)
    assert "cannot" not in caplog.text


def test_an_attention_that_cannot_run_here_is_refused() -> None:
    from pipeline.core.errors import BackboneError

    with pytest.raises(BackboneError, match="attention: varlen cannot run here: it needs a CUDA device"):
        make_passes(tiny_model(), attention="varlen")
