"""A frozen backbone that does not fit on one GPU: every process holds a share of each decoder layer (FSDP2).

A layer is gathered from all processes just before it runs, forward and backward, and freed right after. What is trained
stays outside, whole on every process, and so do the embeddings and the output head, which the passes read directly:
of Qwen3-8B they are 15 % of the weights, the layers 85 %.

Gathering is something that all processes do together. **Every process must run the same number of forward and backward
passes in the same order**, whatever its rows are: passes that look at their data before they decide how often to run
(`make_passes` unless `share_prefix=False`) and steps with fewer micro-batches on one process would wait for ever.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.core.errors import BackboneError, TrainingError

log = logging.getLogger(__name__)


def decoder_layers(backbone: Any) -> list[nn.Module]:
    """The blocks that a causal LM repeats, as its class names them.

    Raises:
        BackboneError: it names none.
    """
    names = set(backbone._no_split_modules or ())
    layers = [module for module in backbone.get_decoder().modules() if type(module).__name__ in names]
    if not layers:
        raise BackboneError(
            f"{type(backbone).__name__} does not say what its layers are: train.shard_backbone cannot share it out"
        )
    return layers


def shard(backbone: Any, accelerator: Any) -> Any:
    """Share the decoder layers of `backbone` out over all processes; the rest moves to this process's device.

    Args:
        backbone: a frozen causal LM on the CPU, or on the meta device; changed in place.
        accelerator: device and processes.

    Returns:
        `backbone`. One process has nobody to share with: it gets the whole.

    Raises:
        TrainingError: something in it is trained.
        BackboneError: its layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise TrainingError("train.shard_backbone needs a frozen backbone: unset train.lora")
    if accelerator.num_processes == 1:
        log.warning("train.shard_backbone: there is one process, which holds the whole backbone")
        return backbone.to(accelerator.device)
    layers = decoder_layers(backbone)
    _log_shares(backbone, layers, accelerator.num_processes)
    shared = {parameter for layer in layers for parameter in layer.parameters()}
    whole = set(backbone.parameters()) - shared
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The root only lets the layers know of each other, so that the next one is gathered while one computes.
    fully_shard(backbone.get_decoder(), mesh=mesh, ignored_params=whole)
    for parameter in whole:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(accelerator.device)
    return backbone


@torch.no_grad()
def _first_pass(backbone: Any) -> None:
    """Gather every layer once: memory first used in inference mode could not be used in training."""
    device = backbone.get_input_embeddings().weight.device
    backbone.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def load_sharded(params: BackboneParams, accelerator: Any) -> Any:
    """The frozen backbone, shared out while it is loaded; no GPU ever holds more than its share and one tensor.

    The first process reads the weights into its main memory and hands them out; the others start from the config alone.

    Raises:
        BackboneError: it cannot be loaded, or is built otherwise from its config than from its weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    loaded = load_backbone(params) if accelerator.is_main_process or accelerator.num_processes == 1 else None
    if accelerator.num_processes == 1:
        return shard(loaded, accelerator)
    weights = loaded.state_dict() if loaded is not None else {}
    backbone = _skeleton(params)
    _check_same(backbone, weights, accelerator)
    shard(backbone, accelerator)
    _materialise(backbone, accelerator.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(backbone, weights, options=options)
    backbone.eval().requires_grad_(False)
    _first_pass(backbone)
    return backbone


def _skeleton(params: BackboneParams) -> Any:
    """The backbone with parameters that have a shape and no values; its buffers, which no file holds, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    code = {"trust_remote_code": params.trust_remote_code}
    config = AutoConfig.from_pretrained(params.name, revision=params.revision, **code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, params.dtype), **code)
    return model.requires_grad_(False)


def _materialise(backbone: Any, device: torch.device) -> None:
    """Give parameters without values some memory, and put the rest where they are."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    backbone._apply(real)  # what `to_empty` does, but for buffers too
    backbone.tie_weights()


def _check_same(backbone: Any, weights: dict[str, torch.Tensor], accelerator: Any) -> None:
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in backbone.state_dict().items()}
    sent = [{name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}]
    torch.distributed.broadcast_object_list(sent, device=accelerator.device)
    other = sorted(name for name in mine.keys() | sent[0].keys() if mine.get(name) != sent[0].get(name))
    if other:
        raise BackboneError(
            f"{type(backbone).__name__} has other weights than its config says ({len(other)}, first {other[0]}): "
            "set train.shard_backbone: false"
        )


def _log_shares(backbone: Any, layers: Sequence[nn.Module], processes: int) -> None:
    total, inside = bytes_of([backbone]), bytes_of(layers)
    each = total - inside + inside / processes
    log.info(
        "train.shard_backbone: %d layers with %.0f %% of the weights in %d shares: %.1f GiB on each process, not %.1f",
        *(len(layers), 100 * inside / total, processes, each / 2**30, total / 2**30),
    )


def bytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of the parameters of some modules, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _distinct(modules))


def _distinct(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    seen = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    yield from seen.values()
