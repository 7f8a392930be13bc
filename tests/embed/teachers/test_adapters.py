"""Merging LoRA adapters: closed-form weights, and a refusal of everything that would leave the base as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.adapters import fetch_adapter, merge_adapter
from tests.backbone.test_loading import gated_repo_error
from tests.embed.teachers.tiny_llm2vec import delta, save_adapter, tiny_lm

MODULES = ["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.2.mlp.down_proj"]


def weight(body: Any, module: str) -> Any:
    return body.get_submodule(module).weight


def rewrite(folder: Path, change: Any) -> None:
    """Change the saved tensors of an adapter: `change` maps them to new ones."""
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("head", [False, True], ids=["of a body", "of a model with a head"])
def test_two_adapters_add_their_products(architecture: str, head: bool, tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "mntp", 1, architecture, head=head)
    second = save_adapter(tmp_path / "simcse", 2, architecture)
    body = tiny_lm(architecture).get_decoder()
    for folder in (first, second):
        body = merge_adapter(body, fetch_adapter(str(folder), None), folder.name)
    plain = tiny_lm(architecture).get_decoder()
    for module in MODULES:
        expected = weight(plain, module) + delta(first, module) + delta(second, module)
        torch.testing.assert_close(weight(body, module), expected)
        assert (expected - weight(plain, module)).norm() > 0.1
    assert type(body) is type(plain)
    assert set(body.state_dict()) == set(plain.state_dict())
    assert not any(parameter.requires_grad for parameter in body.parameters())


def test_merged_equals_kept_on_top(tmp_path: Path) -> None:
    from peft import PeftModel

    folder = save_adapter(tmp_path / "simcse", 3)
    ids = torch.arange(12)[None]
    kept = PeftModel.from_pretrained(tiny_lm("llama").get_decoder(), str(folder))(input_ids=ids).last_hidden_state
    merged = merge_adapter(tiny_lm("llama").get_decoder(), folder, "simcse")(input_ids=ids).last_hidden_state
    torch.testing.assert_close(merged, kept, atol=2e-5, rtol=1e-4)
    assert (merged - tiny_lm("llama").get_decoder()(input_ids=ids).last_hidden_state).norm() > 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {key.replace("layers", "blocks"): t for key, t in w.items()},
            "^name: .* 42 of the 42 .* missing .* 42 of its 42",
        ),
        (lambda w: dict(sorted(w.items())[:-1]), r"1 of the 42 tensors .* missing \(base_model"),
        (
            lambda w: w | {"base_model.model.lm_head.lora_B.weight": torch.ones(2, 2)},
            r"1 of its 43 tensors are unknown \(.*lm_head",
        ),
        (lambda w: {key: t * ("lora_A" in key) for key, t in w.items()}, "changes nothing: all its B matrices"),
        (lambda w: {key: t[:1] for key, t in w.items()}, "does not fit the base model"),
        (lambda w: {key: t * torch.nan for key, t in w.items()}, "mntp holds NaN or infinite weights"),
    ],
    ids=["other names", "one missing", "one too many", "zeros", "shapes", "nan"],
)
def test_an_adapter_that_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    rewrite(folder, change)
    with pytest.raises(TeacherError, match=message):
        merge_adapter(tiny_lm("llama").get_decoder(), folder, "mntp")


def test_an_adapter_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    folder = save_adapter(tmp_path / "mntp", 1)
    wide = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(TeacherError, match="mntp does not fit the base model"):
        merge_adapter(LlamaModel(wide).eval(), folder, "mntp")


def test_in_half_precision_the_rounded_product_is_added(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    plain = tiny_lm("llama").get_decoder().to(torch.bfloat16)
    expected = (weight(plain, MODULES[0]) + delta(folder, MODULES[0]).to(torch.bfloat16)).clone()
    merged = merge_adapter(plain, folder, "mntp")
    assert weight(merged, MODULES[0]).dtype == torch.bfloat16
    torch.testing.assert_close(weight(merged, MODULES[0]), expected)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"mntp holds no adapter_model.safetensors; a pickle .* may run any code"):
        fetch_adapter(str(folder), None)


def test_other_folders_are_named(tmp_path: Path, workspace: Path) -> None:
    with pytest.raises(TeacherError, match=r"folder \./nowhere does not exist"):
        fetch_adapter("./nowhere", None)
    Path("empty").mkdir()
    with pytest.raises(TeacherError, match=r"empty holds no adapter_config.json: it is not an adapter"):
        fetch_adapter("empty", None)
    with pytest.raises(TeacherError, match=r"cannot load 'org/adapter' at revision abc"):
        fetch_adapter("org/adapter", "abc")


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}))
    with pytest.raises(TeacherError, match=r"mntp is of type .*IA3, known is LORA"):
        merge_adapter(tiny_lm("llama").get_decoder(), folder, "mntp")
    file.write_text("{")
    with pytest.raises(TeacherError, match="adapter_config.json cannot be read"):
        merge_adapter(tiny_lm("llama").get_decoder(), folder, "mntp")
    file.write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    merge_adapter(tiny_lm("llama").get_decoder(), folder, "mntp")


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TeacherError, match="adapter_model.safetensors cannot be read"):
        merge_adapter(tiny_lm("llama").get_decoder(), folder, "mntp")


def test_a_gated_adapter_says_how_to_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise gated_repo_error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(TeacherError, match=r"org/gated.*hf auth login"):
        fetch_adapter("org/gated", None)
