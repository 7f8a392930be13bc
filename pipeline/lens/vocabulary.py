"""The logit lens: the vocabulary that the backbone's output head finds at each compression token.

`Encoder.hidden_states` are normed already, so the head applies to them directly; it was not trained on soft prompts.
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
    """Logits float32 `[..., V]` of the causal LM `model` for its final-normed hidden states `[..., d]`.

    A soft cap (Gemma) or scale (Cohere, Granite, Falcon-H1) in the config is applied too, since it changes the
    probabilities.
    """
    from pipeline.backbone.output_head import configured_transform

    logits = model.get_output_embeddings()(hidden).float()
    configured_transform(model.config.get_text_config()).apply_(logits)
    return logits


def _entries(encoder: "Encoder") -> int:
    return int(encoder.model.get_output_embeddings().weight.shape[0])


def _words(encoder: "Encoder", ids: Sequence[int], probabilities: Sequence[float]) -> list[Word]:
    texts = encoder.tokenizer.batch_decode([[token] for token in ids])
    pieces = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    # Every part of a character decodes to the same replacement mark; the tokenizer's own names differ.
    names = [(piece or text) if "\ufffd" in text else text for text, piece in zip(texts, pieces, strict=True)]
    return [Word(name, value) for name, value in zip(names, probabilities, strict=True)]
