"""Each pool of each template, against a plain forward pass over ids written out by hand."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbone.loading import Template
from pipeline.encoder.passes.plain import PlainQueryPass
from pipeline.encoder.passes.prompt_reader import PaddedReader, prompt_reader
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.readings.states import READING_TEMPLATES, FrozenBackbone, TemplateStates
from tests.conftest import tiny_model, tiny_tokenizer

WIDTH, READ = 32, 2
ECHO = "Rewrite the sentence: {0}, rewritten sentence: {0}"


def make(architecture: str = "llama", template: Template = "chat", padded: bool = False) -> FrozenBackbone:
    """A tiny backbone with one thought token and two compression tokens."""
    model = tiny_model(architecture)
    torch.manual_seed(1)
    return FrozenBackbone(
        model=model,
        tokenizer=tiny_tokenizer(),
        reader=PaddedReader(PlainQueryPass(model)) if padded else prompt_reader(model),
        new_tokens=torch.randn(1 + READ, WIDTH),
        read=READ,
        template=template,
        chat_template_kwargs={},
        max_tokens=128,
        batch_tokens=256,
        identity={"name": "tiny"},
    )


def states(backbone: FrozenBackbone, text: str, *, prompted: bool) -> Any:
    """Last hidden states `[T, d]` of a text alone in a plain pass, with the new tokens behind it if prompted."""
    ids = torch.tensor([backbone.tokenizer(text, add_special_tokens=False)["input_ids"]])
    embedded = backbone.model.get_input_embeddings()(ids)
    if prompted:
        embedded = torch.cat([embedded, backbone.new_tokens[None]], dim=1)
    with torch.inference_mode():
        return backbone.model.get_decoder()(inputs_embeds=embedded).last_hidden_state[0]


# The tiny tokenizer makes one token of each byte and of each special token.
TEXT = "so it is"
SAY = "Say:"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_pools_are_those_of_a_plain_pass(architecture: str, padded: bool) -> None:
    backbone = make(architecture, padded=padded)
    length = len(TEXT)

    bare = states(backbone, TEXT, prompted=False)
    check(backbone, "bare", {"text": bare.mean(0), "last": bare[-1]})

    twice = ECHO.format(TEXT)
    check(backbone, "echo", {"text": states(backbone, twice, prompted=False)[-length:].mean(0)})

    # <|user|>Say: so it is<|end|><|bot|> and three new tokens.
    prompt = states(backbone, f"<|user|>{SAY} {TEXT}<|end|><|bot|>", prompted=True)
    begin = 1 + len(SAY) + 1
    assert len(prompt) == begin + length + 2 + 3
    own = prompt[begin : begin + length]
    check(backbone, "prompt", {"tokens": prompt[-2:].mean(0), "text": own.mean(0), "last": prompt[-4]})

    both = states(backbone, f"<|user|>{SAY} {twice}<|end|><|bot|>", prompted=True)
    own = both[-5 - length : -5]
    together = torch.cat([own, both[-2:]]).mean(0)
    check(backbone, "prompt-twice", {"tokens": both[-2:].mean(0), "text": own.mean(0), "both": together})


def check(backbone: FrozenBackbone, name: str, expected: dict[str, Any]) -> None:
    """In a batch with others, in any order, and behind a beginning that is read once."""
    assert READING_TEMPLATES[name].pools == tuple(expected)
    wanted = torch.cat(list(expected.values())).numpy()
    reader = TemplateStates(name, backbone)
    others = ["so it was", "so", "no", "so it is so it is"] * 3
    for texts in ([TEXT], [*others, TEXT], [TEXT, *others]):
        found = reader.encode(texts, SAY)
        np.testing.assert_allclose(found[texts.index(TEXT)], wanted, atol=2e-5, rtol=1e-4)
        assert found.shape == (len(texts), len(expected) * WIDTH)


def test_a_raw_prompt_has_no_frame() -> None:
    backbone = make(template="raw")
    plain = states(backbone, f"{SAY} {TEXT}", prompted=True)
    [found] = TemplateStates("prompt", backbone).encode([TEXT], SAY)
    own = plain[len(SAY) + 1 : -3]
    np.testing.assert_allclose(found, torch.cat([plain[-2:].mean(0), own.mean(0), plain[-4]]), atol=2e-5, rtol=1e-4)


def test_long_and_empty_texts() -> None:
    backbone = replace(make(), max_tokens=10)
    reader = TemplateStates("prompt", backbone)
    # The frame takes 3 tokens, which leaves 7 to the text.
    np.testing.assert_allclose(reader.encode(["so it is"], ""), reader.encode(["so it is not"], ""), atol=1e-5)
    assert not np.allclose(reader.encode(["so it i"], ""), reader.encode(["so it"], ""), atol=1e-3)
    for name in READING_TEMPLATES:
        assert np.isfinite(TemplateStates(name, backbone).encode(["", "a"], "")).all()


def test_the_instruction_is_read_where_there_is_a_prompt() -> None:
    backbone = make()
    for name, template in READING_TEMPLATES.items():
        reader = TemplateStates(name, backbone)
        same = reader.cache_key("a", "Say:", "query") == reader.cache_key("a", "", "query")
        assert same is not template.prompted
        assert np.allclose(reader.encode(["a"], "Say:"), reader.encode(["a"], "")) is same
    assert reader.cache_key("so it", "", "query") != reader.cache_key("it", "so", "query")  # another text is pooled


class Counted(TemplateStates):
    """Counts the texts of its passes."""

    asked = 0

    def encode(self, texts: Sequence[str], instruction: str, side: Any = "query") -> np.ndarray:
        self.asked += len(texts)
        return super().encode(texts, instruction, side)


def test_kept_states_are_read_again_as_float16(tmp_path: Path) -> None:
    backbone, texts = make(), ["one", "two", "three"]
    first, second, other = (Counted("prompt", of) for of in (backbone, backbone, replace(backbone, read=1)))
    with closing(CachedSystem(first, tmp_path, embeddings_dtype="float16", chunk_characters=4)) as cached:
        found = cached.encode(texts, "")
    with closing(CachedSystem(second, tmp_path, embeddings_dtype="float16")) as cached:
        np.testing.assert_array_equal(cached.encode(texts, ""), found)
    with closing(CachedSystem(other, tmp_path, embeddings_dtype="float16")) as cached:
        cached.encode(texts, "")
    assert (first.asked, second.asked, other.asked) == (3, 0, 3)
    np.testing.assert_array_equal(found, first.encode(texts, "").astype(np.float16).astype(np.float32))
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    "change", [{"identity": {"name": "other"}}, {"new_tokens": torch.zeros(3, WIDTH)}, {"max_tokens": 100}, {"read": 1}]
)
def test_what_decides_a_state_is_in_its_identity(change: dict[str, Any]) -> None:
    backbone = make()
    one, other = TemplateStates("prompt", backbone), TemplateStates("prompt", replace(backbone, **change))
    assert one.identity != other.identity
    assert one.identity == TemplateStates("prompt", make()).identity
