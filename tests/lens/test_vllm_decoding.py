"""vLLM's prompt embeddings beside transformers; the messages without vLLM's processes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
from pipeline.core.errors import EngineError
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.inference import Encoder
from pipeline.encoder.student import new_student
from pipeline.generate.engines.base import Completion
from pipeline.lens import decode_soft_prompts
from pipeline.lens.decoding import _in_order, vllm_decoder

TOKENS = 4
QUESTIONS = [
    "What is the capital of France?", "How do I boil an egg?", "What is 12 times 7?", "Name three planets.",
    "Why is the sky blue?", "What is DNA?",
]  # fmt: skip


def test_answers_come_back_in_the_order_of_the_rows_and_a_refused_row_is_named() -> None:
    good = [Completion("1", " b ", "stop", 1), Completion("0", "a", "length", 1)]
    assert _in_order(good, 2) == ["a", "b"]
    with pytest.raises(EngineError, match="soft prompt 3: too long"):
        _in_order([Completion("3", "", "error", 0, "too long")], 4)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineError("nothing is left of the GPU", argument="options.gpu_memory_utilization"), "nothing is left"),
        (EngineError("check options.gpu_memory_utilization", argument="engine"), "ValueError: no such model"),
    ],
)
def test_what_keeps_vllm_from_starting_is_an_option_of_decode(
    tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, error: EngineError, message: str
) -> None:
    def refuse(setup: Any) -> None:
        raise error from (ValueError("no such model") if error.argument == "engine" else None)

    monkeypatch.setattr("pipeline.generate.engines.vllm.VllmEngine.load", refuse)
    decoder = vllm_decoder(BackboneParams(name=str(tiny_backbone()), dtype="float32"), compression_tokens=2)
    with pytest.raises(EngineError, match=rf"^engine: vLLM cannot decode here \({message}.*transformers$") as caught:
        decoder.__enter__()
    assert "options" not in str(caught.value)


@pytest.fixture
def environment() -> Iterator[None]:
    """vLLM writes into os.environ; put it back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllm_writes_what_transformers_writes(small_lm: Path, environment: None) -> None:
    """Untrained soft prompts, and ones that are an answerable question in the backbone's own vectors."""
    pytest.importorskip("vllm")
    params = BackboneParams(name=str(small_lm), dtype="float32")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    student = new_student(model, 16, compression_tokens=TOKENS, thought_tokens=2, seed=0)
    config = EncoderConfig(
        backbone={"name": "b"}, chat_template_kwargs={}, template="chat", max_query_tokens=64, thought_tokens=2,
        compression_tokens=TOKENS, hidden=student.hidden, width=16, teacher={"name": "t"},
    )  # fmt: skip
    encoder = Encoder(model, tokenizer, student, config, {"name": "e"})
    ids = tokenizer(["The capital of France", "Water is made of"])["input_ids"]
    spoken = [model.get_input_embeddings().weight[row[:TOKENS]].numpy() for row in ids]
    soft = np.concatenate([encoder.soft_prompts(QUESTIONS), np.stack(spoken)]).astype(np.float32)
    expected = decode_soft_prompts(encoder, soft, max_new_tokens=12)
    options = {"kv_cache_memory_bytes": 2**28, "max_num_seqs": 4}
    with vllm_decoder(params, compression_tokens=TOKENS, max_new_tokens=12, options=options) as decoder:
        assert decoder(soft) == expected
        # Another order, in which each row shares its steps with others.
        assert decoder(soft[::-1].copy()) == expected[::-1]
    assert "Paris" in expected[-2]
