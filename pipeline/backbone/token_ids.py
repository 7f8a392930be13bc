"""Token ids of many texts from a tokenizer's compiled core, on all cores.

The wrapper around it also makes masks and offsets, and a Python list of each: that takes longer than tokenising.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_WORDS = 2**17
"""Words whose tokens the core remembers, about 200 bytes each; its own 10,000 are fewer than a corpus has."""
_enlarged: "WeakSet[Any]" = WeakSet()


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """The `input_ids` that `tokenizer(texts)` gives: nothing truncated or padded."""
    if (core := _core(tokenizer)) is None:
        return list(tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    return [found.ids for found in core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]


def token_counts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special tokens not counted."""
    if (core := _core(tokenizer)) is None:
        return [len(ids) for ids in token_ids(tokenizer, texts, add_special_tokens=False)]
    return [len(found) for found in core.encode_batch_fast(list(texts), add_special_tokens=False)]


def _core(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The compiled tokenizer as the wrapper sets it for such a call; None where the wrapper does more than that."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = (PreTrainedTokenizerFast._encode_plus, PreTrainedTokenizerBase.__call__)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (kind._encode_plus, kind.__call__) != plain:
        return None
    core = tokenizer.backend_tokenizer
    if core not in _enlarged and hasattr(core.model, "_resize_cache"):
        core.model._resize_cache(CACHED_WORDS)
        _enlarged.add(core)
    # Each only where it differs: a thread may be tokenising, and the core refuses changes meanwhile.
    if core.truncation is not None:
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    if core.encode_special_tokens != tokenizer.split_special_tokens:
        core.encode_special_tokens = tokenizer.split_special_tokens
    return core
