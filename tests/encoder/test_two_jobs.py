"""One model, two jobs: the backbone writes the same text before, while and after it embeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
from pipeline.backbone.lora import LoraParams, adapter_parameters, add_adapter
from pipeline.backbone.prompting import PromptFormatter
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.inference import Encoder
from pipeline.encoder.student import new_student
from pipeline.lens import decode

LORA = LoraParams(rank=2, alpha=8.0)
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write a haiku about rain."]


class Writer:
    """Greedy answers of a loaded model: token ids, and the logits that chose them."""

    def __init__(self, model: Any, tokenizer: Any, new_tokens: int) -> None:
        self._model, self._eos, self._count = model, tokenizer.eos_token_id, new_tokens
        formatter = PromptFormatter(tokenizer, "chat", 128)
        self._prompts = [torch.tensor([formatter(text).token_ids]) for text in QUESTIONS]

    def __call__(self) -> tuple[list[list[int]], list[torch.Tensor]]:
        found = [
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self._count, do_sample=False,
                eos_token_id=self._eos, pad_token_id=self._eos, return_dict_in_generate=True, output_logits=True,
            )
            for prompt in self._prompts
        ]  # fmt: skip
        return [answer.sequences[0].tolist() for answer in found], [torch.cat(answer.logits) for answer in found]


def check(folder: Path, new_tokens: int, lora: LoraParams | None = None) -> None:
    """Write, attach, write, embed and decode, write, detach, write: bit by bit the same."""
    params = BackboneParams(name=str(folder), dtype="float32")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    write = Writer(model, tokenizer, new_tokens)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = write()
    student = new_student(model, 16, compression_tokens=4, thought_tokens=1, seed=0)
    config = EncoderConfig(
        backbone={"name": "b"}, chat_template_kwargs={}, template="chat", max_query_tokens=128, compression_tokens=4,
        thought_tokens=1, hidden=student.hidden, width=16, teacher={"name": "t"}, lora=lora,
    )  # fmt: skip
    adapted = None if lora is None else trained_adapter(model, lora)
    encoder = Encoder(model, tokenizer, student, config, {"name": "e"}, adapted)
    moments = {"attached": write()}
    embeddings = encoder.encode(QUESTIONS)
    if lora is not None:  # the adapters do embed
        plain = Encoder(model, tokenizer, student, config, {"name": "e"}).encode(QUESTIONS)
        assert abs(embeddings - plain).max() > 1e-3
        moments["between both"] = write()
    decode(encoder, QUESTIONS, max_new_tokens=2)
    moments["after embedding"] = write()
    # Between two answers, and the embeddings are not disturbed by the answers either.
    assert (encoder.encode(QUESTIONS) == embeddings).all()
    del encoder, student, adapted
    moments["detached"] = write()
    for moment, (ids, logits) in moments.items():
        assert ids == before[0], moment
        assert all(torch.equal(now, then) for now, then in zip(logits, before[1], strict=True)), moment
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def trained_adapter(model: Any, lora: LoraParams) -> Any:
    """The backbone once more with adapters that change what it computes."""
    adapted = add_adapter(model, **lora.model_dump(), seed=0).requires_grad_(False)
    for number, (name, parameter) in enumerate(sorted(adapter_parameters(adapted).items())):
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return adapted


@pytest.mark.parametrize("lora", [None, LORA], ids=["frozen", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_tiny_model_writes_as_before(
    tiny_backbone: Callable[..., Path], architecture: str, lora: LoraParams | None
) -> None:
    check(tiny_backbone(architecture), 12, lora)


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("lora", [None, LORA], ids=["frozen", "lora"])
def test_a_real_model_writes_as_before(small_lm: Path, lora: LoraParams | None) -> None:
    check(small_lm, 16, lora)


def test_it_writes_and_embeds_in_the_midst_of_embedding(
    tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads of a server would: nothing that another caller uses is switched meanwhile."""
    from pipeline.backbone.attention import grouped as group_attention

    params = BackboneParams(name=str(tiny_backbone("llama")), dtype="float32")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    write = Writer(model, tokenizer, 4)
    config = EncoderConfig(
        backbone={"name": "b"}, chat_template_kwargs={}, template="chat", max_query_tokens=128, compression_tokens=4,
        thought_tokens=1, hidden=32, width=16, teacher={"name": "t"}, lora=None,
    )  # fmt: skip
    student = new_student(model, 16, compression_tokens=4, thought_tokens=1, seed=0)
    encoder = Encoder(model, tokenizer, student, config, {"name": "e"})
    expected, before = encoder.encode(QUESTIONS), write()
    attend, calls = group_attention.attend_at_end, 0
    within: list[Any] = []

    def interrupted(*states: Any, **rules: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            within.extend([encoder.encode(QUESTIONS), write()])
        return attend(*states, **rules)

    monkeypatch.setattr(group_attention, "attend_at_end", interrupted)
    assert (encoder.encode(QUESTIONS) == expected).all()
    assert (within[0] == expected).all()
    for after in (within[1], write()):
        assert after[0] == before[0]
        assert all(torch.equal(now, then) for now, then in zip(after[1], before[1], strict=True))
