"""Token ids of the compiled core are those of the tokenizer that it belongs to."""

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.backbone.token_ids import token_counts, token_ids
from tests.conftest import tiny_tokenizer

TEXTS = ["", "plain", "  spaces  ", "é 🚀\n\n", "<|user|>spelt<|end|>", "x" * 300]


def tokenizer_with_start() -> Any:
    """It puts a token in front of each text."""
    fast = tiny_tokenizer()
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bot|> $A", special_tokens=[("<|bot|>", 1)]
    )
    return fast


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("make", [tiny_tokenizer, tokenizer_with_start])
def test_ids_are_those_of_the_wrapper(make: Any, add_special_tokens: bool) -> None:
    tokenizer = make()
    expected = tokenizer(TEXTS, add_special_tokens=add_special_tokens)["input_ids"]
    assert len({len(ids) for ids in expected}) > 3
    assert token_ids(tokenizer, TEXTS, add_special_tokens=add_special_tokens) == expected
    plain = make()(TEXTS, add_special_tokens=False)["input_ids"]
    assert token_counts(tokenizer, TEXTS) == [len(ids) for ids in plain]
    assert token_ids(tokenizer, []) == []


def test_what_earlier_calls_set_does_not_stay() -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer(TEXTS)["input_ids"]
    tokenizer.pad_token = "<|end|>"
    tokenizer(TEXTS, truncation=True, max_length=2, padding=True, split_special_tokens=True)
    assert token_ids(tokenizer, TEXTS) == expected
    tokenizer.split_special_tokens = True
    assert token_ids(tokenizer, TEXTS) == tokenizer(TEXTS)["input_ids"] != expected


def test_a_wrapper_that_does_more_is_called() -> None:
    class Doubling(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *arguments: Any, **settings: Any) -> Any:
            return super()._encode_plus([each * 2 for each in text], *arguments, **settings)

    plain = tiny_tokenizer()
    doubling = Doubling(tokenizer_object=plain.backend_tokenizer)
    assert token_ids(doubling, ["ab"]) == token_ids(plain, ["abab"])
    assert token_counts(doubling, ["ab"]) == [4]
