"""Tiny backbones and checkpoints of the authors' format whose every number is a formula, not a random draw."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.export.merged.folder import old_rope_keys
from tests.conftest import SMALL_CONFIG, tiny_tokenizer

TOKENS = [f"<question{number}>" for number in range(1, 5)]
WIDTH = 5
RANK = 2
# Base of the rotation; a reader that misses it takes 10,000.
ROPE_THETA = 500.0


def numbers(shape: Sequence[int], seed: int, scale: float = 0.3) -> Tensor:
    """`scale * sin` of the positions times an irrational step, another for each seed."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64) * (2.0**0.5 + seed * 0.618033988749895)
    return (scale * torch.sin(steps)).float().reshape(*shape)


def write_backbone(folder: Path, hidden: int = 32, seed: int = 0) -> Path:
    """A llama of formulas with its tokenizer; the config is one that version 4 of transformers reads too."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config = LlamaConfig(**{**SMALL_CONFIG, "hidden_size": hidden}, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            values = numbers(parameter.shape, seed + number)
            parameter.copy_(1 + values if "norm" in name else values)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | old_rope_keys(rope)))
    # As version 4 names the class.
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def write_checkpoint(folder: Path, backbone: Path, *, lora: bool = False, hidden: int = 32) -> Path:
    """What their package saves for `backbone`: four new tokens, of which three are read out."""
    (folder / "encoder").mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    first = len(tokenizer)
    ids = list(range(first, first + len(TOKENS)))
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "padding_side": "left", "additional_special_tokens": TOKENS,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "run_config.yml").write_text(run_config(backbone))
    model = {"encoding_mode": "last_3_tokens", "save_decoder": False}
    (folder / "encoder_decoder_config.json").write_text(json.dumps(model))
    (folder / "encoder" / "config.json").write_bytes((backbone / "config.json").read_bytes())
    write_adapter(folder, ids, lora=lora, hidden=hidden)
    save_projection(folder / "reconstruction_mlp", numbers((hidden, hidden), 31), numbers((hidden,), 32))
    save_projection(folder / "alignment_mlp", numbers((WIDTH, hidden), 33), numbers((WIDTH,), 34))
    return folder


def run_config(backbone: Path) -> str:
    """As a training run writes it that was started twice: values as Python prints them."""
    first = "model_name_or_path: elsewhere\nspecial_tokens: ['<a>', '<b>']\n"
    return (
        f"{first}\nmodel_name_or_path: {backbone}\npretrained_teacher_path: some/teacher-mntp\n"
        f"pretrained_teacher_path_2: None\ntorch_dtype: float32\nspecial_tokens: {TOKENS}\n"
        "max_input_length: 512\nencoding_mode: last_10_tokens\nfsdp_config: {'xla': False}\nhub_token: <T>\n\n"
    )


def write_adapter(folder: Path, ids: list[int], *, lora: bool, hidden: int) -> None:
    """The adapter, token rows alone or with LoRA on the queries' projections of all layers."""
    # The rows are stored in an order of their own.
    stored = ids[::-1]
    rows = numbers((len(ids), hidden), 21).flip(0).contiguous()
    config: dict[str, Any] = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": stored,
        "target_modules": ["embed_tokens"],
    }
    tensors = {"base_model.model.embed_tokens.trainable_tokens_delta": rows}
    if lora:
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none",
            "target_modules": ["q_proj", "down_proj"], "trainable_token_indices": {"embed_tokens": stored},
        }  # fmt: skip
        tensors = {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
        for layer in range(SMALL_CONFIG["num_hidden_layers"]):
            for name, before, after in (("self_attn.q_proj", hidden, 32), ("mlp.down_proj", 48, hidden)):
                prefix, seed = f"base_model.model.layers.{layer}.{name}", 40 + layer
                tensors[f"{prefix}.lora_A.weight"] = numbers((RANK, before), seed)
                tensors[f"{prefix}.lora_B.weight"] = numbers((after, RANK), seed + 10)
    config |= {"base_model_name_or_path": "x", "inference_mode": True, "task_type": None}
    (folder / "encoder" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "encoder" / "adapter_model.safetensors")


def save_projection(path: Path, weight: Tensor, bias: Tensor, **changes: Any) -> None:
    """As `ProjectionModel.save` writes it."""
    config = {
        "input_dim": weight.shape[1], "output_dim": weight.shape[0], "dtype": "torch.float32",
        "size": 1, "pooling_mode": "linear", **changes,
    }  # fmt: skip
    torch.save({"state_dict": {"projection.weight": weight, "projection.bias": bias}, "config": config}, path)
