"""Decoding soft prompts on tiny backbones: what stops when, in whatever batch, through whatever adapter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.inference import Encoder
from pipeline.lens import decode, decode_soft_prompts
from tests.encoder.test_inference import LORA, make_encoder, write

TEXTS = ["first", "a second query", "x", "", "which one is the longest of all"]
STEPS = 12


@torch.no_grad()
def greedy_ids(encoder: Encoder, soft: np.ndarray, steps: int = STEPS) -> list[int]:
    """The definition: one row, no cache, no end."""
    embeds, ids = torch.from_numpy(soft)[None], []
    for _ in range(steps):
        token = int(encoder.model(inputs_embeds=embeds).logits[0, -1].argmax())
        ids.append(token)
        embeds = torch.cat([embeds, encoder.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return ids


@pytest.fixture
def mixed() -> tuple[Encoder, np.ndarray, list[str]]:
    """An encoder whose answers to random soft prompts stop at different steps, and what each answer is."""
    encoder = make_encoder("llama")
    soft = np.random.default_rng(0).normal(size=(5, 3, 32)).astype(np.float32)
    written = [greedy_ids(encoder, row) for row in soft]
    ends = {
        token: [row.index(token) if token in row else STEPS for row in written]
        for token in {token for row in written for token in row if token > 2}
    }
    stop = max(ends, key=lambda token: len(set(ends[token])))
    assert len(set(ends[stop])) >= 3
    encoder.tokenizer.eos_token = encoder.tokenizer.convert_ids_to_tokens(stop)
    encoder.model.generation_config.eos_token_id = None
    kept = [row[:end] for row, end in zip(written, ends[stop], strict=True)]
    return encoder, soft, [encoder.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
def test_rows_that_stop_at_different_steps_are_the_same_in_every_batch(
    mixed: tuple[Encoder, np.ndarray, list[str]], batch_size: int | None
) -> None:
    encoder, soft, expected = mixed
    assert decode_soft_prompts(encoder, soft, max_new_tokens=STEPS, batch_size=batch_size) == expected
    assert (
        decode_soft_prompts(encoder, soft[::-1].copy(), max_new_tokens=STEPS, batch_size=batch_size) == expected[::-1]
    )


def test_every_end_token_of_the_generation_config_ends_an_answer() -> None:
    encoder = make_encoder("llama")
    [soft] = encoder.soft_prompts(["q"])
    ids = greedy_ids(encoder, soft)
    encoder.model.generation_config.eos_token_id = [2, ids[3]]
    end = ids.index(ids[3])
    expected = encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    assert decode_soft_prompts(encoder, soft[None], max_new_tokens=STEPS) == [expected]


def test_what_a_backbones_file_says_of_sampling_changes_nothing() -> None:
    encoder = make_encoder("qwen3")
    expected = decode(encoder, TEXTS, max_new_tokens=STEPS)
    encoder.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=0.6, top_k=3)
    assert decode(encoder, TEXTS, max_new_tokens=STEPS) == expected


def test_one_text_alone_and_among_others() -> None:
    encoder = make_encoder("gemma3")
    together = decode(encoder, TEXTS, max_new_tokens=STEPS, batch_size=3)
    assert [decode(encoder, [text], max_new_tokens=STEPS)[0] for text in TEXTS] == together


def test_nothing_to_decode() -> None:
    assert decode(make_encoder("llama"), []) == []


def test_thought_tokens_are_no_part_of_a_soft_prompt() -> None:
    """`make_encoder` has one thought and three compression tokens."""
    encoder = make_encoder("llama")
    assert len(encoder.student.tokens) == 4
    soft = encoder.soft_prompts(["q"])
    assert soft.shape == (1, 3, 32)
    expected = encoder.tokenizer.decode(greedy_ids(encoder, soft[0]), skip_special_tokens=True).strip()
    assert decode(encoder, ["q"], max_new_tokens=STEPS) == [expected]


def test_the_backbone_without_adapters_decodes(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(Path("plain"), tiny_backbone("llama"), None)
    write(Path("lora"), tiny_backbone("llama"), LORA)
    plain, adapted = read_encoder(Path("plain")), read_encoder(Path("lora"))
    soft = adapted.soft_prompts(TEXTS)
    assert np.abs(soft - plain.soft_prompts(TEXTS)).max() > 1e-3
    expected = [plain.tokenizer.decode(greedy_ids(plain, row), skip_special_tokens=True).strip() for row in soft]
    assert decode(adapted, TEXTS, max_new_tokens=STEPS) == expected
    assert decode_soft_prompts(plain, soft, max_new_tokens=STEPS) == expected
