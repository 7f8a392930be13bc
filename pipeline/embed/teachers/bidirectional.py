"""Bidirectional attention in a causal transformer, and a probe that verifies it.

Switching only the layers leaves padded batches causal: the mask is made from the config. A hybrid has layers that
cannot be switched (causal convolutions, linear attention), so each layer is probed by itself.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import hidden_states

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    _Call = tuple[tuple[Any, ...], dict[str, Any]]

LONG, SHORT = 12, 7
# Relative to a hidden state's length. A causal model changes by exactly 0; one unit in the last place of one number of
# a bfloat16 vector of 4096 is 6e-5.
MIN_CHANGE = 1e-5
# How far padding may move a row; padding that is attended to moves it by tens of per cent.
TOLERANCE = {"torch.float32": 1e-3, "torch.float16": 0.05, "torch.bfloat16": 0.1}


def make_bidirectional(body: "PreTrainedModel") -> None:
    """Let every token attend to every other, with sdpa and eager attention; without a cache."""
    body.config.is_causal = False
    body.config.use_cache = False
    for module in body.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def check_bidirectional(body: "PreTrainedModel", name: str) -> None:
    """Probe the model with a few tokens of its vocabulary, alone and in a left-padded batch.

    Raises TeacherError if its first token does not see its last, a layer stays causal, or padding changes a row.
    """
    # Two rows of ids spread over the vocabulary that differ at each position.
    spread = [(1 + index * 7919) % int(body.config.vocab_size) for index in range(2 * LONG)]
    first, second = spread[:LONG], spread[LONG:]
    alone = _hidden(body, [first[:SHORT]])[0]
    padded = _hidden(body, [second, first[:SHORT]])[1, LONG - SHORT :]
    changed = [*first[: SHORT - 1], second[SHORT - 1]]
    for how, before, after in (
        ("a text alone", alone, _hidden(body, [changed])[0]),
        ("a left-padded batch", padded, _hidden(body, [second, changed])[1, LONG - SHORT :]),
    ):
        if _distance(before[0], after[0]) < MIN_CHANGE:
            raise TeacherError(
                f"teacher {name} is causal in {how}: changing the last token leaves the first as it was. Its "
                "architecture ignores is_causal: use another base model"
            )
    _check_layers(body, [[first[:SHORT]], [second, first[:SHORT]]], name)
    moved, limit = _distance(alone.mean(0), padded.mean(0)), TOLERANCE[str(body.dtype)]
    if not moved <= limit:
        raise TeacherError(f"teacher {name}: left padding moves an embedding by {moved:.2g}, the limit is {limit:g}")


def _check_layers(body: "PreTrainedModel", batches: Sequence[Sequence[Sequence[int]]], name: str) -> None:
    """Run each layer alone with the sign of its last position's state changed: an earlier position must change."""
    import torch

    layers = _layers(body, name)
    causal = set()
    for rows in batches:
        with torch.inference_mode():
            for index, call in enumerate(_calls(body, layers, rows)):
                if _turning_the_last_moves(layers[index], *call) < MIN_CHANGE:
                    causal.add(index)
    if causal:
        kinds = sorted({type(layers[index]).__name__ for index in causal})
        raise TeacherError(
            f"teacher {name}: {len(causal)} of {len(layers)} layers ({', '.join(kinds)}, the first is layer "
            f"{min(causal)}) see nothing of what comes after: a hybrid cannot be made bidirectional, use another "
            "base model"
        )


def _layers(body: "PreTrainedModel", name: str) -> "Sequence[nn.Module]":
    from torch.nn import ModuleList

    count = body.config.num_hidden_layers
    found = [module for module in body.modules() if isinstance(module, ModuleList) and len(module) == count]
    if not found:
        raise TeacherError(f"teacher {name}: its {count} layers are in no list of modules: use another base model")
    return list(found[0])


def _calls(body: "PreTrainedModel", layers: "Sequence[nn.Module]", rows: Sequence[Sequence[int]]) -> "list[_Call]":
    """The arguments of each layer in a pass over these rows."""
    calls: list[_Call] = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            )
        _hidden(body, rows)
    return calls


def _turning_the_last_moves(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest relative change at an earlier position of the last row when the last one's state changes its sign.

    Over all positions, since the first state of a trained model is so long that little changes it.
    """
    by_name = "hidden_states" in kwargs
    states = kwargs["hidden_states"] if by_name else args[0]
    turned = states.clone()
    turned[:, -1] *= -1

    def out(given: Any) -> Any:
        made = layer(**kwargs | {"hidden_states": given}) if by_name else layer(given, *args[1:], **kwargs)
        return (made[0] if isinstance(made, tuple) else made)[-1, -SHORT:-1].float()

    before, after = out(states), out(turned)
    return float(((before - after).norm(dim=-1) / before.norm(dim=-1)).max())


def _hidden(body: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        ids, mask = (tensor.to(body.device) for tensor in pad_left(rows))
        return hidden_states(body, ids, mask).float()


def _distance(before: Any, after: Any) -> float:
    return float((before - after).norm() / before.norm())
