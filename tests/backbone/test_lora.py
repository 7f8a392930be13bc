"""LoRA on the query pass: against merged weights, beside a backbone that never changes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backbone.loading import BackboneParams, Quantize, load_backbone
from pipeline.backbone.lora import (
    LoraParams,
    adapter_parameters,
    add_adapter,
    check_adapter,
    load_adapter,
    save_adapter,
)
from pipeline.core.config import validate
from pipeline.core.errors import ParamsError, TrainingError
from pipeline.encoder.passes.adapted import AdaptedQueryPass
from pipeline.encoder.passes.plain import Passes, PlainQueryPass, PlainResponsePass
from pipeline.encoder.student import new_student
from pipeline.train.losses import Batch, loss_sums
from tests.conftest import tiny_model

PARAMS = LoraParams(rank=2, alpha=6.0)
QUERIES, RESPONSES = [[5, 6, 7, 8], [9]], [[10, 11, 2], [12, 2]]


def adapted(backbone: Any, seed: int = 0, trained: bool = True, **params: Any) -> Any:
    """An adapter that, if `trained`, already changes something."""
    made = add_adapter(backbone, **{**PARAMS.model_dump(), **params}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(made).items():
            if trained and "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def merged(backbone: Any, adapter: Any) -> Any:
    """A backbone of its own, with `alpha / rank * B @ A` added to its weights, which can be trained."""
    model, pairs = copy.deepcopy(backbone), adapter_parameters(adapter)
    for name, first in pairs.items():
        if "lora_A" in name:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            second = pairs[name.replace("lora_A", "lora_B")]
            layer.weight = torch.nn.Parameter(layer.weight + 3.0 * (second @ first).detach())
    return model


def query(model: Any, tokens: Tensor) -> Tensor:
    return PlainQueryPass(model)(QUERIES, tokens, 2)


def passes_of(backbone: Any, made: Any) -> Passes:
    return Passes(AdaptedQueryPass(PlainQueryPass(made), made), PlainResponsePass(backbone))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_an_adapted_backbone_computes_what_merged_weights_do(architecture: str) -> None:
    backbone = tiny_model(architecture).double()
    made, tokens = adapted(backbone), torch.randn(3, 32, dtype=torch.float64)
    expected = merged(backbone, made)
    outputs = {name: query(model, tokens) for name, model in {"lora": made, "merged": expected}.items()}
    torch.testing.assert_close(outputs["lora"], outputs["merged"], atol=1e-6, rtol=1e-6)
    for output in outputs.values():
        output.square().sum().backward()
    # d/dB of scale * B A is scale * (d/dW) A^T, through the whole query.
    for name, second in adapter_parameters(made).items():
        if "lora_B" in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            first = adapter_parameters(made)[name.replace("lora_B", "lora_A")]
            gradient = 3.0 * expected.get_submodule(path).weight.grad @ first.T
            torch.testing.assert_close(second.grad, gradient, atol=1e-7, rtol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_shares_every_weight() -> None:
    backbone, tokens = tiny_model(), torch.randn(3, 32)
    made = adapted(backbone, trained=False)
    assert torch.equal(query(made, tokens), query(backbone, tokens))
    own = {id(parameter) for parameter in adapter_parameters(made).values()}
    shared = {id(parameter) for parameter in backbone.parameters()}
    assert {id(parameter) for parameter in made.parameters()} == own | shared
    assert {id(parameter) for parameter in made.parameters() if parameter.requires_grad} == own
    assert {id(buffer) for buffer in made.buffers()} == {id(buffer) for buffer in backbone.buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_in_float32_and_the_backbone_answers_as_before(dtype: torch.dtype) -> None:
    backbone = tiny_model().to(dtype)
    ids = torch.tensor([QUERIES[0]])
    before = backbone(input_ids=ids).logits
    made = adapted(backbone, trained=False)
    assert {parameter.dtype for parameter in adapter_parameters(made).values()} == {torch.float32}
    passes = passes_of(backbone, made)
    student = new_student(backbone, 5, compression_tokens=2, thought_tokens=1, seed=0)
    batch = Batch(QUERIES, RESPONSES, torch.ones(2, 5))
    optimizer = torch.optim.AdamW(adapter_parameters(made).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        sums = loss_sums(student, passes, batch, "mean")
        losses.append(sums.align.item())
        (sums.align + 0.01 * sums.recon).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(backbone(input_ids=ids).logits, before)
    assert not torch.equal(made(input_ids=ids).logits, before)


def test_a_checkpointed_response_pass_runs_again_without_the_adapter() -> None:
    """Backward recomputes the response pass after the query pass has run: it must not see an adapter then."""
    from torch.utils.checkpoint import checkpoint

    backbone = tiny_model().double()
    made = adapted(backbone)
    plain = passes_of(backbone, made)
    gradients = []
    for recompute in (False, True):
        tokens = torch.full((3, 32), 0.1, dtype=torch.float64, requires_grad=True)
        soft = plain.query_pass(QUERIES, tokens, 2)

        def respond(soft: Tensor) -> Tensor:
            return plain.response_pass(soft, RESPONSES)[0]

        loss = checkpoint(respond, soft, use_reentrant=False) if recompute else respond(soft)
        plain.query_pass(QUERIES, tokens, 2)
        loss.backward()
        gradients.append(tokens.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_start_follows_the_seed_alone() -> None:
    backbone, state = tiny_model(), torch.random.get_rng_state()
    first, again, other = (adapter_parameters(adapted(backbone, seed, trained=False)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_targets() -> None:
    backbone = tiny_model()
    some = adapter_parameters(add_adapter(backbone, rank=1, alpha=1.0, dropout=0.0, targets=["q_proj"], seed=0))
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in some} == {"q_proj"}
    assert len(some) == 3 * 2
    every = adapter_parameters(add_adapter(backbone, rank=1, alpha=1.0, dropout=0.0, targets="all-linear", seed=0))
    assert len(every) == 3 * 7 * 2
    with pytest.raises(TrainingError, match=r"targets: \['Wqkv'\] cannot be adapted: "):
        add_adapter(backbone, rank=1, alpha=1.0, dropout=0.0, targets=["Wqkv"], seed=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "embed_tokens"], "targets: .* names embeddings"),
        (["q_proj", "lm_head"], "targets: .* names the output head"),
    ],
)
def test_what_an_adapter_would_not_train_is_refused(targets: list[str], message: str) -> None:
    adapted = add_adapter(tiny_model(), rank=1, alpha=1.0, dropout=0.0, targets=targets, seed=0)
    with pytest.raises(TrainingError, match=message):
        check_adapter(adapted, targets)
    for backbone in (tiny_model(), tiny_model().get_decoder()):
        check_adapter(add_adapter(backbone, rank=1, alpha=1.0, dropout=0.0, targets="all-linear", seed=0), "all-linear")


def test_dropout_draws_where_it_trains_and_the_same_again_after_a_resume() -> None:
    backbone, tokens = tiny_model(), torch.randn(3, 32)
    made = adapted(backbone, dropout=0.5)
    passes, state = (
        passes_of(backbone, made),
        torch.random.get_rng_state(),
    )
    with torch.no_grad():
        still = passes.query_pass(QUERIES, tokens, 2)
    assert torch.equal(still, query(made, tokens))
    drawn = passes.query_pass(QUERIES, tokens, 2)
    assert not torch.allclose(drawn, still)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(passes.query_pass(QUERIES, tokens, 2), drawn)
    other = passes.query_pass(QUERIES, tokens + 1e-6, 2)
    assert (other - drawn).abs().max() > 1e-3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_adapters_on_a_quantised_backbone(quantize: Quantize, tiny_backbone: Callable[..., Path]) -> None:
    """The integers are shared too, whichever of the two first runs."""
    pytest.importorskip("bitsandbytes")
    backbone = load_backbone(BackboneParams(name=str(tiny_backbone("llama")), dtype="float32"), quantize=quantize)
    made, tokens = adapted(backbone), torch.randn(3, 32)
    passes = passes_of(backbone, made)
    soft = passes.query_pass(QUERIES, tokens, 2)
    passes.response_pass(soft, RESPONSES)[0].backward()
    parameters = adapter_parameters(made).values()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
    own, shared = (model.model.layers[0].mlp.up_proj for model in (made, backbone))
    assert own.base_layer.weight.data_ptr() == shared.weight.data_ptr()
    assert not torch.equal(query(made, tokens), query(backbone, tokens))


def test_saved_as_peft_saves_and_loaded_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone, tokens = tiny_model("qwen3"), torch.randn(3, 32)
    made = adapted(backbone)
    save_adapter(adapter_parameters(made), tmp_path / "adapter", PARAMS, "org/model")
    loaded = load_adapter(backbone, tmp_path / "adapter", PARAMS)
    assert torch.equal(query(loaded, tokens), query(made, tokens))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    theirs = PeftModel.from_pretrained(tiny_model("qwen3"), str(tmp_path / "adapter")).get_base_model()
    assert torch.equal(query(theirs, tokens), query(made, tokens))
    save_adapter(adapter_parameters(loaded), tmp_path / "again", PARAMS, "org/model")
    for file in sorted((tmp_path / "adapter").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.write_bytes(b"torn"), "cannot be read"),
        (None, "holds 42 tensors, the adapter on this backbone has 42: 42 differ"),
    ],
)
def test_another_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], Any] | None, message: str) -> None:
    backbone = tiny_model()
    save_adapter(adapter_parameters(adapted(backbone)), tmp_path, PARAMS, "org/model")
    if damage is not None:
        damage(tmp_path / "adapter_model.safetensors")
    other = PARAMS if damage is not None else PARAMS.model_copy(update={"rank": 3})
    with pytest.raises(TrainingError, match=message):
        load_adapter(backbone, tmp_path, other)


def test_params_are_checked() -> None:
    assert validate({"targets": ["q_proj"], "alpha": 16}, LoraParams, where="p").targets == ["q_proj"]
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"targets": "q_proj"}, {"alpha": 0}):
        with pytest.raises(ParamsError):
            validate(wrong, LoraParams, where="p")
