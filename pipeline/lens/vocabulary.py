"""The logit lens: the vocabulary that the backbone's output head finds at each compression token.

`Encoder.hidden_states` are the backbone's last hidden states, to which its final norm has been applied once already:
the head applies to them directly. Soft prompts have no such lens: they are what the backbone reads, not what it would
say, and the head was never trained on them; decode them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.encoder.inference import Encoder


class Word(NamedTuple):
    """An entry of the vocabulary, and its probability under the whole vocabulary."""

    word: str
    probability: float


def nearest_vocabulary(
    encoder: "Encoder", texts: Sequence[str], *, count: int = 8, instruction: str = ""
) -> list[list[list[Word]]]:
    """For each text and each compression token, the `count` entries of highest probability, best first."""
    return words_of(encoder, encoder.hidden_states(texts, instruction=instruction), count)


def words_of(encoder: "Encoder", hidden: "np.ndarray[Any, Any]", count: int) -> list[list[list[Word]]]:
    """As `nearest_vocabulary`, from the hidden states of `Encoder.hidden_states`, float32 `[B, n, d]`."""
    import torch

    found = []
    for row in hidden:
        with torch.inference_mode():
            states = torch.from_numpy(row).to(encoder.model.device, encoder.model.dtype)
            best = head_logits(encoder.model, states).softmax(dim=-1).topk(min(count, _entries(encoder)), dim=-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append([_words(encoder, ids, values) for ids, values in pairs])
    return found


def head_logits(model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
    """Logits float32 `[..., V]` as the causal LM `model` makes them of its final-normed hidden states `[..., d]`.

    The head may be tied to the input embeddings or not; what a config says beyond it (a soft cap in Gemma, a scale in
    Cohere and Granite) is applied too: it changes no order, but every probability.
    """
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = (logits / cap).tanh() * cap
    return logits


def _entries(encoder: "Encoder") -> int:
    return int(encoder.model.get_output_embeddings().weight.shape[0])


def _words(encoder: "Encoder", ids: Sequence[int], probabilities: Sequence[float]) -> list[Word]:
    texts = encoder.tokenizer.batch_decode([[token] for token in ids])
    pieces = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    # Part of a character decodes to a replacement mark, all such entries alike; the tokenizer's own name tells them.
    names = [(piece or text) if "\ufffd" in text else text for text, piece in zip(texts, pieces, strict=True)]
    return [Word(name, value) for name, value in zip(names, probabilities, strict=True)]
