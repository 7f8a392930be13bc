"""LLM2Vec teachers from tiny random bases and adapters against one unpadded text at a time."""

import logging
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
from tests.conftest import tiny_tokenizer
from tests.embed.teachers.test_template import with_bos
from tests.embed.teachers.tiny_llm2vec import delta, save_adapter, save_base, tiny_lm

OTHER = BackboneParams(name="org/backbone", revision="main", dtype="bfloat16")
TEXTS = ["short", "a text that is rather longer than the others", "héllo 😀", "x", "another one of middle size", ""]

Folders = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """Base, MNTP and SimCSE of an architecture; MNTP saved from a model with a head, SimCSE from a body."""
    made: dict[str, Folders] = {}

    def make(architecture: str) -> Folders:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            made[architecture] = (
                save_base(root / "base", architecture),
                save_adapter(root / "mntp", 1, architecture, head=True),
                save_adapter(root / "simcse", 2, architecture),
            )
        return made[architecture]

    return make


def build(folders: Folders, backbone: BackboneParams = OTHER, **keys: Any) -> Any:
    base, *adapters = folders
    named = {"name": str(base), "adapters": [{"name": str(folder)} for folder in adapters], "max_tokens": 64}
    return load_teacher(TeacherParams(kind="llm2vec", **({"batch_tokens": 32} | named | keys)), backbone)


def expected(architecture: str, folders: Folders, texts: list[str]) -> Any:
    """Means of an eager model whose weights and full attention are made by hand, one text at a time."""
    model = tiny_lm(architecture)
    model.set_attn_implementation("eager")
    body = model.get_decoder()
    for name, module in body.named_modules():
        if name.endswith("_proj"):
            module.weight.add_(sum(delta(folder, name) for folder in folders[1:]))
    rows = []
    for text in texts:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"] or [2]])
        seen_by_all = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        rows.append(body(input_ids=ids, attention_mask=seen_by_all, use_cache=False).last_hidden_state[0].mean(0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_is_the_mean_of_the_merged_bidirectional_model(architecture: str, folders: Callable[[str], Folders]) -> None:
    found = build(folders(architecture)).embed(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(architecture, folders(architecture), TEXTS), atol=5e-5, rtol=1e-3)


def test_left_padding_does_not_change_a_row(folders: Callable[[str], Folders]) -> None:
    teacher = build(folders("qwen3"), batch_tokens=1024)
    alone = np.concatenate([teacher.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(teacher.embed(TEXTS), alone, atol=2e-5, rtol=1e-4)


def test_every_part_of_the_recipe_counts(folders: Callable[[str], Folders]) -> None:
    base, mntp, simcse = folders("llama")
    chains = ((base, mntp, simcse), (base, mntp), (base, simcse))
    both, first, second = (build(chain).embed(TEXTS[:2]) for chain in chains)
    backbone = BackboneParams(name=str(base), dtype="float32")
    causal = load_teacher(TeacherParams(kind="backbone", max_tokens=64), backbone).embed(TEXTS[:2])
    for one, other in ((both, first), (both, second), (first, second), (first, causal)):
        assert np.linalg.norm(one - other, axis=1).min() > 0.1


def test_a_causal_model_is_refused(folders: Callable[[str], Folders], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.embed.teachers.llm2vec.make_bidirectional", lambda body: None)
    with pytest.raises(TeacherError, match="is causal in a text alone"):
        build(folders("llama"))


def test_without_a_name_the_base_is_the_backbone(folders: Callable[[str], Folders]) -> None:
    base, mntp, simcse = folders("llama")
    own = build((base, mntp, simcse), BackboneParams(name=str(base), dtype="bfloat16"), name=None)
    np.testing.assert_array_equal(own.embed(TEXTS), build((base, mntp, simcse)).embed(TEXTS))


def test_identity_holds_base_and_adapters(folders: Callable[[str], Folders], tmp_path: Path) -> None:
    base, mntp, simcse = folders("llama")
    identity = build((base, mntp, simcse)).identity
    assert identity.items() >= identify(str(base), None).items()
    assert identity["adapters"] == [identify(str(mntp), None), identify(str(simcse), None)]
    assert build((base, simcse, mntp)).identity["adapters"] == identity["adapters"][::-1]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_identity_changes_with_every_file_of_an_adapter(file: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mntp", 1)
    before = identify(str(folder), None)
    (folder / file).write_bytes((folder / file).read_bytes() + b" ")
    assert identify(str(folder), None) != before


def test_the_adapters_own_tokenizer_is_used(folders: Callable[[str], Folders], tmp_path: Path, caplog: Any) -> None:
    import shutil

    base, mntp, simcse = folders("llama")
    shipping = tmp_path / "mntp"
    shutil.copytree(mntp, shipping)
    with_bos().save_pretrained(shipping)
    with caplog.at_level(logging.INFO):
        found = build((base, shipping, simcse)).embed(["ab"])
        plain = build((base, mntp, simcse)).embed(["ab"])
    assert f"tokenizer of the adapter {shipping}" in caplog.text
    assert "tokenizer of the base model" in caplog.text
    assert not np.allclose(found, plain, atol=1e-3)


def test_templates_texts_and_limits(folders: Callable[[str], Folders]) -> None:
    teacher = build(folders("llama"), max_tokens=8)
    assert teacher.token_lengths(["x" * 8, "x" * 9, "  x" + " " * 9, " xy\n"]) == [8, 9, 1, 2]
    np.testing.assert_allclose(teacher.embed([" xy\n", "x" * 9]), teacher.embed(["xy", "x" * 8]), atol=1e-5)
    framed = build(folders("llama"), template="<|user|>{text}<|end|>")
    assert framed.identity["template"] == "<|user|>{text}<|end|>"
    assert not np.allclose(framed.embed(["xy"]), teacher.embed(["xy"]), atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_the_teachers(dtype: str, folders: Callable[[str], Folders]) -> None:
    teacher, full = build(folders("qwen3"), dtype=dtype), build(folders("qwen3")).embed(TEXTS)
    assert teacher.body.dtype == getattr(torch, dtype)
    found = teacher.embed(TEXTS)
    assert found.dtype == np.float32
    assert 0 < (np.linalg.norm(found - full, axis=1) / np.linalg.norm(full, axis=1)).max() < 0.05


def test_the_device_is_the_best_one(
    folders: Callable[[str], Folders], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.embed.teachers import llm2vec

    asked = []

    def load(params: BackboneParams, device: str) -> Any:
        asked.append(device)
        return original(params, "cpu")

    original = llm2vec.load_backbone
    monkeypatch.setattr(llm2vec, "best_device", lambda: "cuda:7")
    monkeypatch.setattr(llm2vec, "load_backbone", load)
    with caplog.at_level(logging.INFO):
        build(folders("llama"))
    assert asked == ["cuda:7"]
    assert "device cuda:7 (the best present), float32" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_equals_the_cpu(folders: Callable[[str], Folders], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.embed.teachers import llm2vec

    on_gpu = build(folders("qwen3"))
    assert on_gpu.body.device.type == "cuda"
    monkeypatch.setattr(llm2vec, "best_device", lambda: "cpu")
    np.testing.assert_allclose(on_gpu.embed(TEXTS), build(folders("qwen3")).embed(TEXTS), atol=1e-3, rtol=1e-2)


def test_mistakes_are_named(folders: Callable[[str], Folders], tmp_path: Path, workspace: Path) -> None:
    base, mntp, simcse = folders("llama")
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.name: .* \./nowhere"):
        build((Path("./nowhere"), mntp, simcse), name="./nowhere")
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.name: cannot load .*org/base"):
        build((base, mntp, simcse), name="org/base")
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.max_tokens: 600 .* 512 positions"):
        build((base, mntp, simcse), max_tokens=600)
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.adapters\.0\.name: .*base holds no adapter_config\.json"):
        build((base, base))
