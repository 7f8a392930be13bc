"""The package of the paper's authors itself; runs in its own environment (`.bench/reference-env`).

official_peer.py write BACKBONE FOLDER token-rows|lora    a checkpoint, by the classes that train and save there
official_peer.py encode FOLDER MAX_LENGTH < texts.json    its embeddings as JSON
"""

import json
import sys
from typing import Any

import torch
import transformers
from llm2vec_gen import LLM2VecGenModel  # type: ignore[import-not-found]
from llm2vec_gen.config import CustomTrainingArguments, ModelArguments  # type: ignore[import-not-found]
from llm2vec_gen.models import EncoderDecoderModel, ProjectionModel, apply_peft  # type: ignore[import-not-found]
from llm2vec_gen.utils import save_args_to_yaml  # type: ignore[import-not-found]
from peft import TrainableTokensConfig, get_peft_model

TOKENS = [f"<question{number}>" for number in range(1, 5)]
WIDTH = 5


def write(backbone: str, folder: str, kind: str) -> None:
    """A checkpoint with four new tokens, of which three are read out, its trained numbers random."""
    torch.manual_seed(0)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(backbone, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    config = transformers.AutoConfig.from_pretrained(backbone)
    config.num_special_tokens, config.special_tokens_ids = len(ids), ids
    encoder: Any = transformers.AutoModel.from_pretrained(backbone, config=config, torch_dtype=torch.float32)
    encoder.resize_token_embeddings(len(tokenizer))
    if kind == "lora":
        encoder = apply_peft(encoder, lora_r=2, lora_alpha=6, special_tokens_ids=ids)
    else:
        encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=ids))
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model = EncoderDecoderModel(
        encoder_model=encoder,
        decoder_model=transformers.AutoModelForCausalLM.from_pretrained(backbone),
        encoding_mode="last_3_tokens",
        reconstruction_mlp=ProjectionModel(config.hidden_size, config.hidden_size),
        alignment_mlp=ProjectionModel(config.hidden_size, WIDTH),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described = ModelArguments(
        model_name_or_path=backbone, torch_dtype="float32", special_tokens=TOKENS, encoding_mode="last_3_tokens"
    )
    for arguments in (described, CustomTrainingArguments(output_dir=folder, report_to=[])) * 2:
        save_args_to_yaml(arguments, folder)


def encode(folder: str, max_length: int, texts: list[str]) -> list[list[float]]:
    """Embeddings of `texts` as one batch."""
    found: list[list[float]] = LLM2VecGenModel.from_pretrained(folder).encode(texts, max_length).float().tolist()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        print(json.dumps(encode(sys.argv[2], int(sys.argv[3]), json.load(sys.stdin))))
