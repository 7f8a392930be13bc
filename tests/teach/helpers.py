"""Tiny adapted models, and texts of two clusters."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone.loading import BackboneParams
from pipeline.backbone.lora import adapter_parameters, add_adapter
from pipeline.backbone.prompting import SLOT
from pipeline.embed.teachers.bidirectional import make_bidirectional
from pipeline.embed.teachers.template import TemplateTokenizer, Tokens
from pipeline.teach.params import TeachParams
from pipeline.teach.recipe import Recipe
from tests.conftest import tiny_model, tiny_tokenizer

FAST: dict[str, Any] = {
    "mntp": {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "max_tokens": 40, "learning_rate": 0.01},
    "simcse": {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "max_tokens": 40, "learning_rate": 0.01},
    "dtype": "float32",
    "checkpoint_every": 1,
    "quality": {"texts": 16},
}


def params(**changes: dict[str, Any]) -> TeachParams:
    """`FAST` with some keys of its phases changed."""
    merged = {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in FAST.items()
    }
    return TeachParams.model_validate(merged)


def two_clusters(count: int) -> list[str]:
    """Texts that differ in one of two words and a few letters of their own, behind much that is the same in all."""
    random = np.random.default_rng(0)
    texts: dict[str, None] = {}
    while len(texts) < count:
        word = "bbbbbb" if len(texts) % 2 else "yyyyyy"
        texts[f"{'m' * 12} {'m' * 11} {word} {''.join(random.choice(list('cdefg'), 3))}"] = None
    return list(texts)


def adapted(*, dropout: float = 0.0, architecture: str = "llama") -> tuple[Any, dict[str, Any], Any]:
    """A bidirectional body with fresh adapters, its parameters, and the language model itself."""
    lm = tiny_model(architecture)
    # As it is initialised, no hidden state gives more than nearly uniform predictions.
    lm.get_output_embeddings().weight.data *= 20
    body = lm.get_decoder()
    make_bidirectional(body)
    wrapped = add_adapter(body, rank=8, alpha=16.0, dropout=dropout, targets="all-linear", seed=0)
    return wrapped, adapter_parameters(wrapped), lm


def read(texts: list[str], max_tokens: int = 64) -> list[Tokens]:
    """Rows of tokens of the tiny tokenizer."""
    return TemplateTokenizer(tiny_tokenizer(), max_tokens=max_tokens)(texts)


def recipe(backbone: Path, texts: list[str], work: Path, params: TeachParams) -> Recipe:
    """The recipe on a tiny backbone."""
    named = BackboneParams(name=str(backbone), dtype="float32")
    return Recipe(params, named, texts, template=SLOT, pooling="mean", work=work)
