"""Mean pooling of a frozen LLM against one text at a time, on real architectures with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core.errors import TeacherError
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.load import load_teacher
from pipeline.embed.teachers.pooling import PooledTeacher
from pipeline.embed.teachers.template import TEMPLATES, TemplateTokenizer
from tests.conftest import tiny_model, tiny_tokenizer
from tests.embed.teachers.test_template import with_bos

ARCHITECTURES = ["llama", "qwen3", "gemma3"]
TEXTS = ["short", "a text that is longer than the sliding window", "héllo 😀", "x", "another one of middle size"]


def teacher(
    architecture: str = "llama", batch_tokens: int | None = 64, max_tokens: int = 64, tokenizer: Any = None
) -> Any:
    rules = TemplateTokenizer(tokenizer or tiny_tokenizer(), max_tokens=max_tokens)
    body = tiny_model(architecture).get_decoder()
    return PooledTeacher(body, rules, batch_tokens=batch_tokens, identity={"name": "tiny"})


def pooled(model: Any, ids: list[int], first: int = 0) -> Any:
    """The mean over the final hidden states of one unpadded row, from position `first` on."""
    return model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, first:].mean(0).numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_equals_each_text_alone(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    expected = np.stack([pooled(model, tokenizer(text)["input_ids"]) for text in TEXTS])
    for batch_tokens in (1, 64, None):
        found = teacher(architecture, batch_tokens).embed(TEXTS)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert found.dtype == np.float32
    assert np.linalg.norm(expected[0] - expected[1]) > 0.1


def passes_of(body: Any) -> list[tuple[int, int]]:
    """The shapes of all passes that `body` will read, rows and padded tokens of a row."""
    shapes: list[tuple[int, int]] = []
    body.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_pass_holds_no_more_tokens_than_the_budget() -> None:
    made = teacher(batch_tokens=24)
    shapes = passes_of(made.body)
    made.embed(["x" * length for length in (3, 40, 8, 8, 12, 3, 8, 1)])
    assert shapes == [(1, 40), (2, 12), (3, 8), (2, 3)]  # the longest text goes alone


def test_windows_of_texts_change_no_vector_and_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'many ' * (row % 5)}words {row}" for row in range(23)]
    whole = teacher().embed(texts)
    monkeypatch.setattr("pipeline.embed.teachers.pooling.WINDOW_TEXTS", 4)
    np.testing.assert_allclose(teacher().embed(texts), whole, atol=2e-5, rtol=1e-4)


def test_special_tokens_are_read_but_not_pooled() -> None:
    tokenizer = with_bos()
    ids = tokenizer("hello")["input_ids"]
    assert ids[0] == 1
    found = teacher(tokenizer=tokenizer).embed(["hello", "a longer companion"])[0]
    np.testing.assert_allclose(found, pooled(tiny_model(), ids, first=1), atol=2e-5, rtol=1e-4)


def test_a_long_text_loses_its_end() -> None:
    short = teacher(max_tokens=8)
    assert tiny_tokenizer()("x" * 8)["input_ids"] == tiny_tokenizer()("x" * 9)["input_ids"][:8]
    np.testing.assert_allclose(short.embed(["x" * 100]), short.embed(["x" * 8]), atol=1e-6)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, with_bos])
def test_an_empty_text_embeds_as_eos(tokenizer: Callable[[], Any]) -> None:
    start = tokenizer()("")["input_ids"]
    found = teacher(tokenizer=tokenizer()).embed(["", "companion"])[0]
    np.testing.assert_allclose(found, pooled(tiny_model(), [*start, 2], first=len(start)), atol=2e-5, rtol=1e-4)


def test_no_text_gives_no_row() -> None:
    assert teacher().embed([]).shape == (0, 32)


def test_token_lengths_are_of_whole_texts() -> None:
    limited = teacher(max_tokens=4, tokenizer=with_bos())
    assert (limited.token_lengths(["abc", "abcd", ""]), limited.max_tokens) == ([4, 5, 1], 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_token_pooling_is_the_texts_own_last(architecture: str, tiny_backbone: Callable[..., Path]) -> None:
    params = TeacherParams(kind="backbone", max_tokens=16, pooling="last")
    built = load_teacher(params, BackboneParams(name=str(tiny_backbone(architecture))))
    ids = tiny_tokenizer()("hello")["input_ids"]
    found = built.embed(["x", "hello", "a longer one than that"])
    np.testing.assert_allclose(found[1], pooled(tiny_model(architecture), ids, first=4), atol=2e-5, rtol=1e-4)
    assert built.identity["pooling"] == "last"


def test_an_echo_pools_its_second_reading(tiny_backbone: Callable[..., Path]) -> None:
    template = "Rewrite: {text}, rewritten: {text}"
    params = TeacherParams(kind="backbone", max_tokens=64, template=template)
    built = load_teacher(params, BackboneParams(name=str(tiny_backbone("qwen3"))))
    ids = tiny_tokenizer()("Rewrite: hello, rewritten: hello")["input_ids"]
    found = built.embed(["x", "hello", "a longer one than that"])
    np.testing.assert_allclose(found[1], pooled(tiny_model("qwen3"), ids, first=len(ids) - 5), atol=2e-5, rtol=1e-4)
    assert built.identity["template"] == template


def test_one_word_pools_the_state_that_would_name_the_word(tiny_backbone: Callable[..., Path]) -> None:
    params = TeacherParams(kind="backbone", max_tokens=64, template="one-word", pooling="last")
    built = load_teacher(params, BackboneParams(name=str(tiny_backbone("llama"))))
    ids = tiny_tokenizer()('This sentence : "hello" means in one word:"')["input_ids"]
    found = built.embed(["x", "hello", "a longer one than that"])
    np.testing.assert_allclose(found[1], pooled(tiny_model(), ids, first=len(ids) - 1), atol=2e-5, rtol=1e-4)
    # Of a text that is too long the end goes, never the question.
    assert built.token_lengths(["y" * 200]) > [built.max_tokens]
    fits = 64 - len(tiny_tokenizer()('This sentence : "" means in one word:"')["input_ids"])
    np.testing.assert_allclose(built.embed(["y" * 200]), built.embed(["y" * fits]), atol=1e-5)


def test_a_named_template_is_what_it_stands_for() -> None:
    assert TeacherParams(kind="backbone", template="echo").template == TEMPLATES["echo"]
    assert TeacherParams(kind="backbone", template="text") == TeacherParams(kind="backbone")
    with pytest.raises(ValueError, match="template one-word needs pooling last"):
        TeacherParams(kind="backbone", template="one-word")
    with pytest.raises(ValueError, match=r"'eco' holds no \{text\} and is none of text, echo, one-word"):
        TeacherParams(kind="backbone", template="eco")
    with pytest.raises(ValueError, match="valid string"):
        TeacherParams(kind="backbone", template=["echo"])


def test_built_by_kind_it_is_pinned_like_the_backbone(tiny_backbone: Callable[..., Path]) -> None:
    folder = tiny_backbone("qwen3")
    params = TeacherParams(kind="backbone", max_tokens=16, dtype="float32")
    built = load_teacher(params, BackboneParams(name=str(folder), dtype="bfloat16"))
    assert built.width == 32
    assert built.identity.items() >= identify(str(folder), None).items()
    assert built.identity["dtype"] == "float32"
    np.testing.assert_allclose(built.embed(["hi"]), teacher("qwen3", max_tokens=16).embed(["hi"]), atol=1e-6)


def test_half_precision_gives_float32_vectors_close_to_full(tiny_backbone: Callable[..., Path]) -> None:
    backbone = BackboneParams(name=str(tiny_backbone("llama")))
    half, full = (
        load_teacher(TeacherParams(kind="backbone", dtype=dtype), backbone) for dtype in ("bfloat16", "float32")
    )
    assert half.embed(TEXTS).dtype == np.float32
    np.testing.assert_allclose(half.embed(TEXTS), full.embed(TEXTS), atol=0.05)


def test_more_tokens_than_positions(tiny_backbone: Callable[..., Path]) -> None:
    params = TeacherParams(kind="backbone", max_tokens=513)
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.max_tokens: 513 exceeds .* 512 positions"):
        load_teacher(params, BackboneParams(name=str(tiny_backbone("llama"))))
