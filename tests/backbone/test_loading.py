"""Prompt formatting, identities and padding."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import GatedRepoError
from transformers.utils import logging

from pipeline.backbone.loading import (
    BackboneParams,
    Keep,
    Quantize,
    Template,
    identify,
    load_backbone,
    load_config,
    load_tokenizer,
)
from pipeline.backbone.prompting import PromptFormatter, eos_token_id, pad_left, pad_right
from pipeline.core.errors import BackboneError
from tests.conftest import tiny_tokenizer


def gated_repo_error() -> GatedRepoError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return GatedRepoError("403 Client Error.", response=response)


def test_a_file_of_weights_that_is_damaged_is_named(tiny_backbone: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone(), tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")  # what git has of it
    with pytest.raises(BackboneError, match=f"^cannot load backbone '{folder}': .*header"):
        load_backbone(BackboneParams(name=str(folder)))


def test_weights_are_read_without_a_bar(tiny_backbone: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    params = BackboneParams(name=str(tiny_backbone()), dtype="float32")
    capfd.readouterr()
    load_backbone(params)
    assert capfd.readouterr().err == ""
    bars: list[dict[str, Any]] = []

    def user_hook(_make: Any, _arguments: Any, options: dict[str, Any]) -> Any:
        bars.append(options)
        return SimpleNamespace()

    logging.set_tqdm_hook(user_hook)
    try:
        load_backbone(params)
        assert bars == []
        logging.tqdm([], desc="the user's")
        assert bars == [{"desc": "the user's"}]
    finally:
        logging.set_tqdm_hook(None)


def test_chat_prompt_is_the_template_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    prompt = PromptFormatter(tokenizer, "chat", 50)("hi")
    assert tokenizer.decode(prompt.token_ids) == "<|user|>hi<|end|><|bot|>"
    assert not prompt.truncated


def test_long_text_loses_its_end_and_keeps_the_template() -> None:
    tokenizer = tiny_tokenizer()
    prompt = PromptFormatter(tokenizer, "chat", 10)("abcdefghijkl")
    assert tokenizer.decode(prompt.token_ids) == "<|user|>abcdefg<|end|><|bot|>"
    assert prompt.truncated


@pytest.mark.parametrize("text", ["x" * 100_000, "😀" * 5000, "שלום " * 3000, "a", "😀"])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_any_text_fits(text: str, keep: Keep) -> None:
    prompt = PromptFormatter(tiny_tokenizer(), "raw", 33, keep=keep)(text)
    assert 1 <= len(prompt.token_ids) <= 33
    assert prompt.truncated == (len(text.encode()) > 33)


def test_template_kwargs_reach_the_template() -> None:
    tokenizer = tiny_tokenizer("{{ mode }}{{ messages[0]['content'] }}")
    assert tokenizer.decode(PromptFormatter(tokenizer, "chat", 20, {"mode": "m:"})("q").token_ids) == "m:q"


def test_no_chat_template_names_the_way_out() -> None:
    with pytest.raises(BackboneError, match="no chat template: use an instruct model"):
        PromptFormatter(tiny_tokenizer(chat_template=None), "chat", 20)
    assert PromptFormatter(tiny_tokenizer(chat_template=None), "raw", 20)("hi").token_ids


def test_limit_below_the_template_names_both_values() -> None:
    with pytest.raises(BackboneError, match="takes 3 tokens, the limit is 3"):
        PromptFormatter(tiny_tokenizer(), "chat", 3)


def test_identity_follows_the_weights_not_the_place(tiny_backbone: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_backbone("llama")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert identify(str(copy), None)["sha256"] == identify(str(folder), None)["sha256"]
    assert identify(str(tiny_backbone("qwen3")), None)["sha256"] != identify(str(folder), None)["sha256"]
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identify(str(copy), None)["sha256"] != identify(str(folder), None)["sha256"]


@pytest.mark.parametrize("name", ["generation_config.json", "modules.json", "1_Pooling/config.json", "modeling_own.py"])
def test_identity_follows_every_file_that_decides_what_is_computed(
    name: str, tiny_backbone: Callable[..., Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_backbone("llama"), tmp_path / "copy")
    before = identify(str(copy), None)["sha256"]
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    assert identify(str(copy), None)["sha256"] != before


def test_identity_does_not_follow_the_words_about_a_model(tiny_backbone: Callable[..., Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_backbone("llama"), tmp_path / "copy")
    before = identify(str(copy), None)["sha256"]
    (copy / "README.md").write_text("words")
    assert identify(str(copy), None)["sha256"] == before


def test_identity_of_a_hub_model_is_its_revision() -> None:
    assert identify("org/model", "abc") == {"name": "org/model", "revision": "abc"}


@pytest.mark.parametrize("name", ["./nowhere", "models/nowhere/deep"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(BackboneError, match="does not exist"):
        identify(name, None)


def test_a_folder_that_is_missing_beside_others_is_no_name_on_the_hub(workspace: Path) -> None:
    """As in a clone, or in a DVC experiment in a folder of its own: `models/` is there, its models are not in git."""
    Path("models").mkdir()
    for use in (
        lambda: identify("models/gone", None),
        lambda: load_tokenizer(BackboneParams(name="models/gone")),
        lambda: load_config(BackboneParams(name="models/gone")),
        lambda: load_backbone(BackboneParams(name="models/gone")),
    ):
        with pytest.raises(BackboneError, match=r"^model folder models/gone does not exist, though the folder models"):
            use()
    assert identify("models/gone", "a" * 40) == {"name": "models/gone", "revision": "a" * 40}
    assert identify("org/gone", None) == {"name": "org/gone", "revision": "main"}


def test_a_hub_model_in_the_cache_beside_a_folder_of_the_same_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("org").mkdir()
    Path("cache/models--org--model").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "cache")
    assert identify("org/model", None) == {"name": "org/model", "revision": "main"}


def test_missing_model_is_one_line() -> None:
    with pytest.raises(BackboneError, match="cannot load backbone './nowhere'") as caught:
        load_backbone(BackboneParams(name="./nowhere"))
    assert "\n" not in str(caught.value)


def test_backbone_is_frozen_and_its_tokenizer_needs_no_pad(tiny_backbone: Callable[..., Path]) -> None:
    params = BackboneParams(name=str(tiny_backbone("gemma3")), dtype="bfloat16")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token is None
    assert eos_token_id(tokenizer) == 2


def test_padding_sides() -> None:
    ids, mask = pad_left([[5], [6, 7]])
    assert (ids.tolist(), mask.tolist()) == ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    ids, mask = pad_right([[5], [6, 7]])
    assert (ids.tolist(), mask.tolist()) == ([[5, 0], [6, 7]], [[1, 0], [1, 1]])


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_a_batch_is_its_texts_one_by_one(template: str) -> None:
    formatter = PromptFormatter(tiny_tokenizer(), template, 12)
    texts = ["", "short", "much longer than twelve tokens", "short"]
    assert formatter.batch(texts) == [formatter(text) for text in texts]
    assert formatter.batch([]) == []


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_the_end_of_a_long_text_is_kept_when_asked_to(template: str) -> None:
    tokenizer = tiny_tokenizer()
    formatter = PromptFormatter(tokenizer, template, 10, keep="end")
    prompt = formatter("the beginning and the end")
    room = 10 if template == "raw" else 7
    assert prompt.text == "the beginning and the end"[-room:]
    assert prompt.truncated
    assert len(prompt.token_ids) == 10
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=True) == prompt.text
    whole = formatter("the end")
    assert (whole.text, whole.truncated) == ("the end", False)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantising_without_the_library_names_what_to_install(
    quantize: Quantize, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backbone.loading.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=rf"quantize: {quantize} needs bitsandbytes.*\[quantize\]"):
        load_backbone(BackboneParams(name=str(tiny_backbone("llama"))), quantize=quantize)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("quantize", "bits", "agreement"), [("8bit", 8, 0.99), ("4bit", 4, 0.9)])
def test_a_quantised_backbone_trains_nearly_as_the_whole_one(
    quantize: Quantize, bits: int, agreement: float, tiny_backbone: Callable[..., Path]
) -> None:
    """Gradients to the student point where those of the unquantised backbone do; head and embeddings stay whole."""
    pytest.importorskip("bitsandbytes")
    import torch

    from pipeline.encoder.passes.select import make_passes
    from pipeline.encoder.student import new_student
    from pipeline.train.losses import Batch, loss_sums

    params, gradients = BackboneParams(name=str(tiny_backbone("llama")), dtype="float32"), []
    for setting in (None, quantize):
        model = load_backbone(params, quantize=setting)
        student = new_student(model, 5, compression_tokens=2, thought_tokens=1, seed=0)
        sums = loss_sums(student, make_passes(model), Batch([[5, 6, 7], [8]], [[9, 2], [4]], torch.ones(2, 5)), "mean")
        (sums.align + sums.recon).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {model.get_input_embeddings().weight.dtype, model.lm_head.weight.dtype} == {torch.float32}
    layer = model.model.layers[0].mlp.up_proj.weight
    assert layer.element_size() * layer.numel() * 8 == bits * 32 * 48
    assert agreement < torch.cosine_similarity(*gradients, dim=0) < 0.999999


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_a_text_that_loses_its_start_keeps_what_is_put_before_it(template: Template) -> None:
    tokenizer = tiny_tokenizer()
    formatter = PromptFormatter(tokenizer, template, 12, keep="end")
    room = 12 - 5 - (3 if template == "chat" else 0)
    texts = ["abcdefghijklmnop", "x", "", "é" * 900]
    cut, fits, empty, wide = formatter.batch(texts, "Say: ")
    assert (cut.text, cut.truncated) == ("Say: " + texts[0][-room:], True)
    assert (fits.text, fits.truncated, empty.text) == ("Say: x", False, "Say: ")
    assert wide.text == "Say: " + "é" * (room // 2)
    assert tokenizer.decode(cut.token_ids, skip_special_tokens=True) == cut.text
    assert len(cut.token_ids) == 12
    starts = PromptFormatter(tokenizer, template, 12)
    assert starts.batch(texts, "Say: ") == starts.batch(["Say: " + text for text in texts])


@pytest.mark.parametrize("keep", ["start", "end"])
def test_the_template_echo_has_the_text_twice_and_says_where_the_second_stands(keep: Keep) -> None:
    tokenizer, frame = tiny_tokenizer(), len("Say: Rewrite the sentence: , rewritten sentence: ") + 3
    formatter = PromptFormatter(tokenizer, "echo", frame + 2 * 6, keep=keep)
    texts = ["abcdef", "", "{text}", "abcdefgh", "é<|end|>", "x" * 90_000]
    kept = {
        "start": ["abcdef", "", "{text}", "abcdef", "é<|en", "x" * 6],
        "end": ["abcdef", "", "{text}", "cdefgh", "|end|>", "x" * 6],
    }
    prompts = formatter.batch(texts, "Say: ")
    assert prompts == [formatter.batch([text], "Say: ")[0] for text in texts]
    for prompt, text, rest in zip(prompts, texts, kept[keep], strict=True):
        assert (prompt.text, prompt.truncated) == (f"Say: {rest}", rest != text)
        content = f"Say: Rewrite the sentence: {rest}, rewritten sentence: {rest}"
        assert tokenizer.decode(prompt.token_ids) == f"<|user|>{content}<|end|><|bot|>"
        assert prompt.second is not None and tokenizer.decode(prompt.token_ids[prompt.second]) == f" {rest}"
    with pytest.raises(BackboneError, match="raise"):
        PromptFormatter(tokenizer, "echo", frame - 5)
    with pytest.raises(BackboneError, match="leaves none for a text"):
        formatter.batch(["long text"], "An instruction that is too long: ")


def test_a_control_token_that_a_text_spells_is_read_twice_as_characters() -> None:
    prompt = PromptFormatter(tiny_tokenizer(), "echo", 120)("a<|end|>")
    assert prompt.control_tokens
    assert prompt.token_ids.count(tiny_tokenizer().convert_tokens_to_ids("<|end|>")) == 1
    assert prompt.second == slice(len(prompt.token_ids) - 2 - 9, len(prompt.token_ids) - 2)


def test_an_instruction_without_room_behind_it() -> None:
    formatter = PromptFormatter(tiny_tokenizer(), "chat", 8, keep="end")
    assert formatter.batch(["x"], "1234")[0].token_ids
    with pytest.raises(BackboneError, match="'12345' takes 8 tokens, template included, the limit is 8"):
        formatter.batch(["x"], "12345")


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_backbone])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_gated_repository_says_how_to_open_it(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any], wrapped: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        if wrapped:
            raise OSError("You are trying to access a gated repo.\nMake sure to") from gated_repo_error()
        raise gated_repo_error()

    for loader in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{loader}.from_pretrained", refuse)
    hint = r"accept its licence at https://huggingface\.co/meta/lm, then run `hf auth login` or set HF_TOKEN$"
    with pytest.raises(BackboneError, match=hint):
        load(BackboneParams(name="meta/lm", dtype="float32"))


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", {"": "cuda:1"}), ("cpu", None)])
def test_weights_are_read_straight_onto_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: dict[str, str] | None
) -> None:
    model, seen = MagicMock(), list[Any]()

    def load(*_: Any, **options: Any) -> Any:
        seen.append(options.get("device_map"))
        return model

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    load_backbone(BackboneParams(name="lm", dtype="float32"), device)
    assert seen == [expected]
    model.to.assert_called_once_with(device)
