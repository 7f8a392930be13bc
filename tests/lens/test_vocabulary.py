"""The logit lens against the logits that the causal LM itself makes."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.inference import Encoder
from pipeline.encoder.student import new_student
from pipeline.lens import nearest_vocabulary
from pipeline.lens.vocabulary import head_logits
from tests.conftest import SMALL_CONFIG, tiny_tokenizer


def model_of(kind: str, tied: bool, **extra: Any) -> Any:
    """A tiny random causal LM whose final norm is no identity: normed twice, its states would differ."""
    from transformers import (
        AutoModelForCausalLM,
        CohereConfig,
        Gemma2Config,
        Gemma3TextConfig,
        GraniteConfig,
        LlamaConfig,
    )

    configs = {
        "llama": LlamaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "cohere": CohereConfig,
        "granite": GraniteConfig,
    }  # fmt: skip
    torch.manual_seed(0)
    settings = SMALL_CONFIG | {"tie_word_embeddings": tied} | extra
    model = AutoModelForCausalLM.from_config(configs[kind](**settings)).eval().requires_grad_(False)
    torch.nn.init.uniform_(model.get_decoder().norm.weight, 0.2, 3.0)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


KINDS = [
    ("llama", {}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gemma3", {"final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "extra"), KINDS)
def test_logits_are_those_of_the_model_itself(kind: str, tied: bool, extra: dict[str, Any]) -> None:
    """So the final norm is applied exactly once, the head is the right one, and caps and scales are honoured."""
    model = model_of(kind, tied, **extra)
    tied_in_memory = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied_in_memory == tied
    config = EncoderConfig(
        backbone={"name": "tiny"}, chat_template_kwargs={}, template="raw", max_query_tokens=32, compression_tokens=3,
        thought_tokens=1, hidden=32, width=5, teacher={"name": "t"},
    )  # fmt: skip
    student = new_student(model, 5, compression_tokens=3, thought_tokens=1, seed=0)
    encoder = Encoder(model, tiny_tokenizer(), student, config, {"name": "tiny"})
    ids = torch.tensor([encoder.tokenizer("query")["input_ids"]])
    embeds = torch.cat([model.get_input_embeddings()(ids), student.tokens[None]], dim=1)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, use_cache=False).logits[0, -3:]
        hidden = torch.from_numpy(encoder.hidden_states(["query"])[0])
        torch.testing.assert_close(head_logits(model, hidden), expected, atol=2e-4, rtol=1e-4)
        normed_again = head_logits(model, model.get_decoder().norm(hidden))
    assert (normed_again - expected).abs().max() > 1e-2
    probabilities, best = expected.softmax(-1).topk(4, dim=-1)
    [words] = nearest_vocabulary(encoder, ["query"], count=4)
    assert [[word.word for word in token] for token in words] == [
        [name_of(encoder.tokenizer, entry) for entry in token] for token in best.tolist()
    ]
    found = [[word.probability for word in token] for token in words]
    np.testing.assert_allclose(found, probabilities.numpy(), atol=1e-4)


def name_of(tokenizer: Any, entry: int) -> str:
    """What an entry stands for; the tokenizer's own name for what is part of a character."""
    text = tokenizer.decode([entry])
    return tokenizer.convert_ids_to_tokens(entry) or text if text == "\ufffd" else text


def test_parts_of_a_character_are_told_apart() -> None:
    from tests.encoder.test_inference import make_encoder

    [words] = nearest_vocabulary(make_encoder(), ["q"], count=259)
    names = [word.word for word in words[0]]
    assert not [name for name in names if name == "\ufffd"]
    assert len(set(names)) > 250


def test_no_more_words_than_there_are() -> None:
    from tests.encoder.test_inference import make_encoder

    [words] = nearest_vocabulary(make_encoder(), ["q"], count=10_000)
    assert {len(token) for token in words} == {260}
    np.testing.assert_allclose([sum(word.probability for word in token) for token in words], 1, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # its kernels are not installed
def test_falcons_multiplier_reaches_the_probabilities() -> None:
    from transformers import AutoModelForCausalLM, FalconH1Config

    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8, lm_head_multiplier=0.125, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head_logits(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
