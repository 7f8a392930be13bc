"""Which modules drop: attention where it can, other modules only where it cannot."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from pipeline.embed.teachers.pooling import hidden_states
from pipeline.teach.dropout import SeededDropout

IDS = torch.arange(5, 15).reshape(2, 5)


def old_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).get_decoder()


def gpt2() -> Any:
    return old_model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None))


def opt() -> Any:
    return old_model(
        OPTConfig(
            vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    )  # fmt: skip


class Plain(nn.Module):
    """No attention, a dropout module."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, opt])
def test_attention_of_older_models_drops_and_nothing_else_does(make: Any, implementation: str) -> None:
    body = make()
    body.set_attn_implementation(implementation)
    dropout = SeededDropout(body, 0.3)
    assert dropout.active == {"attention": 2}
    others = [
        module for module in body.modules() if isinstance(module, nn.Dropout) and module not in dropout._in_attention
    ]
    assert not {module.p for module in others} & {0.3}

    def read(*seed: int) -> Any:
        with dropout.enabled(*seed):
            assert not any(module.training for module in others)
            return hidden_states(body, IDS, torch.ones_like(IDS))

    first, again, second = read(0), read(0), read(1)
    assert torch.equal(first, again)
    # The first position reads itself alone: dropped or scaled, and nothing else.
    assert ((first - second).norm(dim=-1)[:, 1:] > 1e-4).all()
    assert not any(module.training for module in body.modules())


def test_modules_drop_only_where_attention_cannot() -> None:
    body = Plain()
    dropout = SeededDropout(body, 0.3)
    assert (dropout.active, body.drop.p, dropout.drops_in_backbone) == ({"modules": 1}, 0.3, True)
    with_attention = nn.Sequential(Plain(), nn.Linear(2, 2))
    with_attention[1].attention_dropout = 0.0  # type: ignore[assignment]
    dropout = SeededDropout(with_attention, 0.3)
    assert (dropout.active, with_attention[0].drop.p) == ({"attention": 1}, 0.0)


def test_a_model_without_dropout() -> None:
    dropout = SeededDropout(nn.Linear(2, 2), 0.3)
    assert not dropout.drops_in_backbone
    assert not dropout.active
