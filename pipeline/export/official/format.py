"""The checkpoint format of the paper's authors: what `LLM2VecGenModel.from_pretrained` of their package (0.1.3) reads.

    run_config.yml                      name of the backbone, dtype of everything, texts of the N new tokens
    encoder_decoder_config.json         "encoding_mode": "last_n_tokens", "save_decoder": false
    encoder/                            a peft adapter, and the config of the backbone with N more tokens
    reconstruction_mlp, alignment_mlp   pickles: the state dict of a linear layer and its shape
    tokenizer.json, tokenizer_config.json   the backbone's, with the N new tokens added in order

The adapter is of type TRAINABLE_TOKENS, or of type LORA with `trainable_token_indices`; either way its
`...trainable_tokens_delta` `[N, d]` holds the rows themselves, for the ids that its config lists. It may also hold the
whole embedding table, which is the backbone's.

Their `encode` appends the texts of the new tokens to the bare text, cuts both together to 512 tokens so that the new
ones stay, runs everything in the dtype of `run_config.yml`, and averages alignment(reconstruction(h)) over the last n
positions, without normalising.
"""

RUN_CONFIG = "run_config.yml"
MODEL_CONFIG = "encoder_decoder_config.json"
ENCODER = "encoder"
RECONSTRUCTION = "reconstruction_mlp"
ALIGNMENT = "alignment_mlp"
ADAPTER_CONFIG = f"{ENCODER}/adapter_config.json"
ADAPTER_WEIGHTS = f"{ENCODER}/adapter_model.safetensors"
ADAPTER_PICKLE = f"{ENCODER}/adapter_model.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Cut of `encode` where its caller names none: the text and the new tokens together.
MAX_LENGTH = 512
# How peft names what it wraps.
PREFIX = "base_model.model."
ROWS = "trainable_tokens_delta"


def token_texts(count: int) -> list[str]:
    """Texts of the new tokens, as the authors' runs name them."""
    return [f"<question{number}>" for number in range(1, count + 1)]
