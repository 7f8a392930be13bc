"""Tiny random bases and LoRA adapters as folders, as peft writes them."""

from pathlib import Path
from typing import Any

from tests.conftest import tiny_model, tiny_tokenizer

RANK, ALPHA = 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_lm(architecture: str) -> Any:
    """As `tiny_model`, and qwen2 (with its biases) beside."""
    if architecture != "qwen2":
        return tiny_model(architecture)
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_base(folder: Path, architecture: str = "llama") -> Path:
    """A base model with its tokenizer."""
    tiny_lm(architecture).save_pretrained(folder)
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, seed: int, architecture: str = "llama", *, head: bool = False, std: float = 0.2, **config: Any
) -> Path:
    """A random LoRA adapter of a body, or of the model with its head; `std` is that of both matrices."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = tiny_lm(architecture)
    keys = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": None} | config
    wrapped: Any = get_peft_model(model if head else model.get_decoder(), LoraConfig(**keys))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    wrapped.save_pretrained(folder)
    return folder


def delta(folder: Path, module: str) -> Any:
    """scale * B @ A of one module of a saved adapter, e.g. `layers.0.self_attn.q_proj`, whatever it was saved from."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    (a,) = (tensor for key, tensor in weights.items() if key.endswith(f"{module}.lora_A.weight"))
    (b,) = (tensor for key, tensor in weights.items() if key.endswith(f"{module}.lora_B.weight"))
    return ALPHA / RANK * b @ a
