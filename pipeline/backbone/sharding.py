"""A frozen backbone that does not fit on one GPU: every process holds a share of each decoder layer (FSDP2).

A layer is gathered just before it runs, forward and backward, and freed right after. What is trained, the embeddings
and the output head stay whole on every process: the passes read them directly (15 % of the weights of Qwen3-8B).

**Every process must run the same number of forward and backward passes in the same order**, whatever its rows are, or
all wait for ever: `make_passes` needs `share_prefix=False`, and every process as many micro-batches.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.core.errors import BackboneError

log = logging.getLogger(__name__)


def decoder_layers(backbone: Any) -> list[nn.Module]:
    """The blocks that a causal LM repeats, as its class names them; BackboneError if it names none."""
    names = set(backbone._no_split_modules or ())
    layers = [module for module in backbone.get_decoder().modules() if type(module).__name__ in names]
    if not layers:
        raise BackboneError(
            f"{type(backbone).__name__} does not name its layers, so they cannot be sharded", argument="backbone"
        )
    return layers


def shard(backbone: Any, accelerator: Any) -> Any:
    """Shard the decoder layers of `backbone` in place; the rest moves to this process's device.

    `backbone` is on the CPU or the meta device; with one process it stays whole.

    Raises:
        BackboneError: something in it is trained, or its layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise BackboneError("only a frozen backbone can be sharded: unset lora", argument="backbone")
    if accelerator.num_processes == 1:
        log.warning("sharding: there is one process, which holds the whole backbone")
        return backbone.to(accelerator.device)
    layers = decoder_layers(backbone)
    _log_shares(backbone, layers, accelerator.num_processes)
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    whole = set(backbone.parameters()) - sharded
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
    """The frozen backbone, sharded while it is loaded; no GPU ever holds more than its share and one tensor.

    The first process reads the weights into main memory and broadcasts them; the others start from the config.

    Raises:
        BackboneError: it cannot be loaded, or its config builds other tensors than its weights have.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    loaded = load_backbone(params) if accelerator.is_main_process or accelerator.num_processes == 1 else None
    if accelerator.num_processes == 1:
        return shard(loaded, accelerator)
    weights = loaded.state_dict() if loaded is not None else {}
    backbone = _skeleton(params)
    _check_equal_shapes(backbone, weights, accelerator)
    shard(backbone, accelerator)
    _materialise(backbone, accelerator.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(backbone, weights, options=options)
    backbone.eval().requires_grad_(False)
    _first_pass(backbone)
    return backbone


def _skeleton(params: BackboneParams) -> Any:
    """The backbone with parameters on the meta device; its buffers, which no file holds, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    code = {"trust_remote_code": params.trust_remote_code}
    config = AutoConfig.from_pretrained(params.name, revision=params.revision, **code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, params.dtype), **code)
    return model.requires_grad_(False)


def _materialise(backbone: Any, device: torch.device) -> None:
    """Allocate meta parameters on `device`, and move the rest there."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    backbone._apply(real)  # what `to_empty` does, but for buffers too
    backbone.tie_weights()


def _check_equal_shapes(backbone: Any, weights: dict[str, torch.Tensor], accelerator: Any) -> None:
    own, sent = (
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (backbone.state_dict(), weights)
    )
    message = [sent]
    torch.distributed.broadcast_object_list(message, device=accelerator.device)
    different = sorted(name for name in own.keys() | message[0].keys() if own.get(name) != message[0].get(name))
    if different:
        raise BackboneError(
            f"{type(backbone).__name__} has other weights than its config says ({len(different)}, first "
            f"{different[0]}), so it cannot be loaded sharded",
            argument="backbone",
        )


def _log_shares(backbone: Any, layers: Sequence[nn.Module], processes: int) -> None:
    total, inside = bytes_of([backbone]), bytes_of(layers)
    each = total - inside + inside / processes
    log.info(
        "sharding: %d layers with %.0f %% of the weights in %d shares: %.1f GiB on each process, not %.1f",
        *(len(layers), 100 * inside / total, processes, each / 2**30, total / 2**30),
    )


def bytes_of(modules: Sequence[nn.Module]) -> int:
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
