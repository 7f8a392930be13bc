"""Reading an embedding: the answer that its soft prompts decode to, and the vocabulary nearest to its tokens."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.encoder.inference import Encoder


@torch.inference_mode()
def decode(
    encoder: Encoder, texts: Sequence[str], *, max_new_tokens: int = 64, instruction: str = "", batch_size: int = 16
) -> list[str]:
    """The answers that the embeddings of `texts` hold, written greedily by the backbone from the soft prompts alone.

    The query itself is not in its sight; the soft prompts are all it sees.
    """
    soft = encoder.soft_prompts(texts, instruction=instruction)
    return decode_soft_prompts(encoder, soft, max_new_tokens=max_new_tokens, batch_size=batch_size)


@torch.inference_mode()
def decode_soft_prompts(
    encoder: Encoder, soft_prompts: np.ndarray, *, max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """As `decode`, from stored soft prompts float32 `[B, n, d]`."""
    model, eos = encoder.model, encoder.tokenizer.eos_token_id
    answers: list[str] = []
    for start in range(0, len(soft_prompts), batch_size):
        embeds = torch.from_numpy(soft_prompts[start : start + batch_size]).to(model.device, model.dtype)
        ids = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        answers += [text.strip() for text in encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return answers


@torch.inference_mode()
def nearest_vocabulary(
    encoder: Encoder, texts: Sequence[str], *, count: int = 8, instruction: str = ""
) -> list[list[list[str]]]:
    """The logit lens: for each text and each compression token, the `count` vocabulary entries of highest logit.

    The hidden states are final-normed, so the output head applies to them directly.
    """
    hidden = encoder.hidden_states(texts, instruction=instruction)
    head = encoder.model.get_output_embeddings()
    result = []
    for row in hidden:
        logits = head(torch.from_numpy(row).to(encoder.model.device, encoder.model.dtype))
        ids = logits.topk(count, dim=-1).indices.tolist()
        result.append([[encoder.tokenizer.decode([token]) for token in position] for position in ids])
    return result
