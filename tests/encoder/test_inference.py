"""The encoder in use, on a tiny backbone."""

import numpy as np
import pytest
import torch

from pipeline.encoder.config import EncoderConfig
from pipeline.encoder.inference import Encoder, read_config
from pipeline.encoder.student import new_student
from pipeline.errors import TrainingError
from pipeline.lens import decode, decode_soft_prompts, nearest_vocabulary
from tests.conftest import tiny_model, tiny_tokenizer


def make_encoder() -> Encoder:
    """An untrained encoder on a tiny backbone."""
    model = tiny_model("qwen3")
    config = EncoderConfig(
        backbone={"name": "tiny"}, chat_template_kwargs={}, template="chat", max_query_tokens=32,
        compression_tokens=3, thought_tokens=1, hidden=32, width=5, teacher={"name": "t"},
    )  # fmt: skip
    student = new_student(model, 5, compression_tokens=3, thought_tokens=1, seed=0)
    return Encoder(model, tiny_tokenizer(), student, config, {"name": "tiny"})


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder()


def test_encode_is_batch_independent_and_in_order(encoder: Encoder) -> None:
    texts = ["a", "a longer text than the others", "mid size", ""]
    together = encoder.encode(texts)
    assert together.shape == (4, 5)
    assert together.dtype == np.float32
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode([text])[0], together[row], atol=1e-5)


def test_encode_of_nothing(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 5)


def test_an_empty_text_under_the_raw_template_reads_as_eos(encoder: Encoder) -> None:
    config = encoder.config.model_copy(update={"template": "raw"})
    raw = Encoder(encoder.model, encoder.tokenizer, encoder.student, config, {})
    np.testing.assert_allclose(raw.encode(["", "b"])[0], raw.encode([encoder.tokenizer.eos_token])[0], atol=1e-5)
    assert raw.encode([""]).shape == (1, 5)


def test_instruction_is_part_of_the_input(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.encode(["q"], instruction="Say:"), encoder.encode(["Say: q"]))
    assert np.abs(encoder.encode(["q"], instruction="Say:") - encoder.encode(["q"])).max() > 1e-4


def test_long_text_keeps_its_compression_tokens(encoder: Encoder) -> None:
    """Truncation takes the text's end, never the new tokens: the cut text embeds like its kept beginning."""
    kept = 32 - 3
    np.testing.assert_allclose(encoder.encode(["x" * 500]), encoder.encode(["x" * kept]), atol=1e-6)


def test_embedding_is_the_head_of_the_soft_prompts(encoder: Encoder) -> None:
    soft = torch.from_numpy(encoder.soft_prompts(["q"]))
    with torch.no_grad():
        np.testing.assert_allclose(encoder.student.embedding(soft).numpy(), encoder.encode(["q"]), atol=1e-6)


def test_untrained_shares_the_backbone(encoder: Encoder) -> None:
    other = encoder.untrained(seed=3)
    assert other.model is encoder.model
    assert np.abs(other.encode(["q"]) - encoder.encode(["q"])).max() > 1e-3
    np.testing.assert_array_equal(other.encode(["q"]), encoder.untrained(seed=3).encode(["q"]))


def test_decode_equals_a_greedy_loop_without_a_cache(encoder: Encoder) -> None:
    soft = encoder.soft_prompts(["first", "second query"])
    expected = [greedy(encoder, torch.from_numpy(row), 6) for row in soft]
    assert decode_soft_prompts(encoder, soft, max_new_tokens=6) == expected
    assert decode(encoder, ["first", "second query"], max_new_tokens=6) == expected


@torch.no_grad()
def greedy(encoder: Encoder, soft: torch.Tensor, steps: int) -> str:
    embeds, ids = soft[None], []
    for _ in range(steps):
        token = int(encoder.model(inputs_embeds=embeds).logits[0, -1].argmax())
        if token == encoder.tokenizer.eos_token_id:
            break
        ids.append(token)
        embeds = torch.cat([embeds, encoder.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_nearest_vocabulary_is_the_head_of_the_hidden_state(encoder: Encoder) -> None:
    [positions] = nearest_vocabulary(encoder, ["q"], count=4)
    hidden = torch.from_numpy(encoder.hidden_states(["q"])[0])
    best = encoder.model.lm_head(hidden).argmax(-1).tolist()
    assert [position[0] for position in positions] == [encoder.tokenizer.decode([token]) for token in best]
    assert all(len(position) == 4 for position in positions)


def test_a_folder_that_is_no_encoder(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrainingError, match="is not an encoder"):
        read_config(tmp_path)
