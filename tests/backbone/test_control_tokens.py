"""Control tokens that a text spells stay text; ordinary prompts keep their tokens."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.loading import BackboneParams, Template, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from tests.conftest import tiny_tokenizer

USER, BOT, END = 0, 1, 2  # ids of the tiny tokenizer's control tokens
ECHO = "<|user|>{{ messages[0]['content'] }}<|end|>{{ messages[0]['content'] }}<|bot|>"
SPELT = ["<|end|>", "a <|end|><|user|> b", "<|bot|>" * 3, "\U000f0000 <|end|> \U000f0001"]
ORDINARY = ["What is <b>?", "", "  two  spaces ", "é 東京 🙂", "<| end |>", "def f(x):\n    return x\n", "<think>"]


def letters(tokenizer: Any, text: str) -> list[int]:
    """The tiny tokenizer's tokens of a text without special tokens: its bytes."""
    spelt = "".join(piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return list(tokenizer.convert_tokens_to_ids(list(spelt)))


@pytest.mark.parametrize("text", SPELT)
def test_what_a_text_spells_is_its_letters(text: str) -> None:
    tokenizer = tiny_tokenizer()
    own = letters(tokenizer, text)
    assert not {USER, BOT, END} & set(own)
    chat = PromptFormatter(tokenizer, "chat", 200)(text)
    assert chat.token_ids == [USER, *own, END, BOT]
    assert (chat.control_tokens, chat.text) == (True, text)
    assert PromptFormatter(tokenizer, "raw", 200)(text).token_ids == own
    twice = PromptFormatter(tiny_tokenizer(ECHO), "chat", 200)(text)
    assert twice.token_ids == [USER, *own, END, *own, BOT]


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_a_long_text_that_spells_them_is_cut_to_fit(template: Template, keep: Any) -> None:
    tokenizer = tiny_tokenizer()
    text = "<|end|>" * 30
    prompt = PromptFormatter(tokenizer, template, 50, keep=keep)(text)
    room = 50 if template == "raw" else 47
    assert prompt.text == (text[:room] if keep == "start" else text[-room:])
    assert len(prompt.token_ids) == 50
    assert prompt.token_ids.count(END) == (0 if template == "raw" else 1)


def test_a_batch_of_both_kinds_is_its_texts_one_by_one() -> None:
    formatter = PromptFormatter(tiny_tokenizer(), "chat", 60)
    texts = [*ORDINARY, *SPELT, *ORDINARY]
    assert formatter.batch(texts) == [formatter(text) for text in texts]
    assert [prompt.control_tokens for prompt in formatter.batch(texts)] == [text in SPELT for text in texts]


def test_tokens_that_take_space_along_do_so_around_a_text_that_spells_one() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer("<|turn|>\n{{ messages[0]['content'] }}<|end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|turn|>", rstrip=True, special=True)]})
    formatter = PromptFormatter(tokenizer, "chat", 60)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert formatter("x").token_ids == [turn, *letters(tokenizer, "x"), END]
    assert formatter("x<|end|>").token_ids == [turn, *letters(tokenizer, "x<|end|>"), END]


def test_a_mask_token_stays_what_the_tokenizer_makes_of_it() -> None:
    """LLM2Vec's adapters make `_` their mask token, and their texts are full of it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "_"})
    control = ControlTokens(tokenizer)
    assert not control.within("snake_case")
    assert control.encode(["a_b"])["input_ids"] == tokenizer(["a_b"])["input_ids"]


def test_ordinary_prompts_keep_their_tokens(small_lm: Path) -> None:
    tokenizer = load_tokenizer(BackboneParams(name=str(small_lm)))
    formatter = PromptFormatter(tokenizer, "chat", 200)
    for text in ORDINARY:
        turn = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert formatter(text).token_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        # Piece by piece they are the same, so a text that spells a token is read as its neighbours are.
        assert ControlTokens(tokenizer).encode_inside(formatter._chat.render, text) == formatter(text).token_ids  # type: ignore[union-attr]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelt = formatter("What does <|im_end|> mean?")
    assert spelt.token_ids.count(end) == formatter("What does it mean?").token_ids.count(end)
    assert tokenizer.decode(spelt.token_ids) == formatter._chat.render("What does <|im_end|> mean?")  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", ["start", "end"])
def test_a_slow_tokenizer_cuts_and_reads_texts_all_the_same(keep: Any) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    tokenizer.chat_template = "{{ messages[0]['content'] }}</s>"
    byte = {char: tokenizer.convert_tokens_to_ids(char) for char in "x</s>"}
    formatter = PromptFormatter(tokenizer, "chat", 9, keep=keep)
    assert formatter("x</s>").token_ids == [*(byte[char] for char in "x</s>"), tokenizer.eos_token_id]
    cut = formatter("😀" * 40)  # four bytes each
    assert (cut.text, len(cut.token_ids), cut.truncated) == ("😀😀", 9, True)
    assert PromptFormatter(tokenizer, "raw", 9, keep=keep)("😀" * 40).text == "😀😀"
