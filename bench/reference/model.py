"""The reference's model around our weights; runs in its own environment."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import TrainableTokensConfig, get_peft_model
from torch import Tensor


def build_model(classes: Any, backbone: Path, student: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The backbone with our student, as the reference starts training: an adapter for the new tokens, two projections.

    Args:
        classes: has the reference's `EncoderDecoderModel` and `ProjectionModel`.
        backbone: folder that transformers 4 reads.
        student: our trained tensors by name.
        dtype: of everything.
    """
    config = transformers.AutoConfig.from_pretrained(backbone)
    tokens, width = student["tokens"], student["alignment.weight"].shape[0]
    config.num_special_tokens = len(tokens)
    config.special_tokens_ids = list(range(config.vocab_size, config.vocab_size + len(tokens)))
    encoder = transformers.AutoModel.from_pretrained(backbone, config=config, torch_dtype=dtype)
    encoder.resize_token_embeddings(config.vocab_size + len(tokens))
    encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=config.special_tokens_ids))
    decoder = transformers.AutoModelForCausalLM.from_pretrained(backbone, config=config, torch_dtype=dtype)
    model = classes.EncoderDecoderModel(
        encoder_model=encoder,
        decoder_model=decoder.requires_grad_(False),
        encoding_mode=f"last_{len(tokens)}_tokens",
        reconstruction_mlp=classes.ProjectionModel(config.hidden_size, config.hidden_size, dtype=dtype),
        alignment_mlp=classes.ProjectionModel(config.hidden_size, width, dtype=dtype),
    )
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(student[name])
    return model


def trained(model: Any) -> dict[str, Any]:
    """Its trained tensors under our names."""
    (tokens,) = [p for name, p in model.encoder_model.named_parameters() if "trainable_tokens_delta" in name]
    reconstruction, alignment = model.reconstruction_mlp.projection, model.alignment_mlp.projection
    return {
        "tokens": tokens,
        "reconstruction.weight": reconstruction.weight,
        "reconstruction.bias": reconstruction.bias,
        "alignment.weight": alignment.weight,
        "alignment.bias": alignment.bias,
    }
