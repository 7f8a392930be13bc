"""An encoder folder read: what is wrong with it or its backbone is said in one line."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.core.errors import BackboneError, ParamsError, PipelineError, TrainingError
from pipeline.encoder.folder.read import check_backbone, read_config, read_encoder
from tests.conftest import tiny_tokenizer
from tests.encoder.test_inference import LORA, write

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def folder(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    write(Path("encoder"), tiny_backbone("llama"), None)
    return Path("encoder")


def fails(message: str, kind: type[PipelineError] = TrainingError, path: str = "encoder", **options: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_encoder(Path(path), **options)
    assert "\n" not in str(caught.value)


def change(**values: Any) -> None:
    file = Path("encoder/encoder_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- folders --------------------------------------------------------------------------------------------------------


def test_what_is_no_encoder_folder(folder: Path, tiny_backbone: Callable[..., Path]) -> None:
    Path("empty").mkdir()
    Path("theirs").mkdir()
    Path("theirs/run_config.yml").touch()
    fails(r"nowhere is not an encoder \(there is no such folder", path="nowhere")
    fails(r"README.md is not an encoder \(it is a file", path="encoder/README.md")
    fails(r"empty is not an encoder \(no encoder_config.json: run the train stage first", path="empty")
    fails("it looks like a language model", path=str(tiny_backbone("llama")))
    fails("checkpoint of the authors' package: python -m pipeline import-official", path="theirs")


def test_a_damaged_config(folder: Path) -> None:
    Path("encoder/encoder_config.json").write_text('{"backbone": ')
    fails("encoder_config.json is damaged .*: run the train stage again")
    Path("encoder/encoder_config.json").write_bytes(b"\xff\xfe\x00")
    fails("encoder_config.json is damaged")


def test_a_config_with_an_unknown_side(folder: Path) -> None:
    change(keep="middle")
    fails("keep: .*'start' or 'end' .got 'middle'", ParamsError)


def test_damaged_weights(folder: Path) -> None:
    file = Path("encoder/student.safetensors")
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != "tokens"}, file)
    fails(r"tokens has shape None, encoder_config.json says \[3, 32\]")
    save_file({**tensors, "alignment.bias": tensors["alignment.bias"][:4].clone()}, file)
    fails(r"alignment.bias has shape \[4\], encoder_config.json says \[5\]")
    file.write_bytes(file.read_bytes()[:50])
    fails("student.safetensors cannot be read")
    file.unlink()
    fails("student.safetensors cannot be read")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_not_called_a_backbone(folder: Path, name: str) -> None:
    """Without its settings transformers would load one all the same, which may read texts in another way."""
    (folder / name).rename(folder / "away")
    fails(rf"^(the tokenizer in encoder cannot be read .*|encoder has no {name}): copy the folder again")
    if name == "tokenizer.json":
        (folder / name).write_text("{")
        fails("^the tokenizer in encoder cannot be read")


# --- which side is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["start", "end"])
def test_the_side_that_is_kept_is_recorded(folder: Path, tiny_backbone: Callable[..., Path], keep: Any) -> None:
    write(Path("other"), tiny_backbone("llama"), None, keep=keep)
    assert read_config(Path("other")).keep == keep
    start, encoder = read_encoder(folder), read_encoder(Path("other"))
    same = np.allclose(encoder.encode(["a" * 20 + "b" * 20]), start.encode(["a" * 20 + "b" * 20]), atol=1e-6)
    assert same == (keep == "start")
    assert (encoder.identity["sha256"], encoder.identity.get("keep", "start")) == (start.identity["sha256"], keep)


# --- backbones ------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_backbone_is_the_backbone(folder: Path, tiny_backbone: Callable[..., Path]) -> None:
    shutil.copytree(tiny_backbone("llama"), "copy")
    expected = read_encoder(folder)
    for place in ("copy", Path("copy")):
        found = read_encoder(folder, backbone=place)
        np.testing.assert_array_equal(found.encode(["q"]), expected.encode(["q"]))
        assert found.identity == expected.identity


def test_another_backbone_needs_a_word(
    folder: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    other = str(tiny_backbone("qwen3"))
    fails(r"has sha256 \w{12}\.\.\., the encoder was trained on .*, sha256 .* --allow-other-backbone", backbone=other)
    fails("has revision main, the encoder was trained on", backbone="org/other")
    assert caplog.messages == []
    found, expected = read_encoder(folder, backbone=other, allow_other_backbone=True), read_encoder(folder)
    assert len(caplog.messages) == 1
    assert "the encoder was trained on" in caplog.text
    assert np.isfinite(found.encode(["q"])).all()
    assert np.abs(found.encode(["q"]) - expected.encode(["q"])).max() > 1e-3
    assert found.identity != expected.identity
    assert found.identity["other_backbone"]["name"] == other


def narrow(folder: Path, **sizes: int) -> str:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.conftest import SMALL_CONFIG

    AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL_CONFIG, **sizes})).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_sizes_that_do_not_fit_are_refused_whatever_is_allowed(
    folder: Path, tiny_backbone: Callable[..., Path]
) -> None:
    thin, small = narrow(Path("thin"), hidden_size=24), narrow(Path("small"), vocab_size=200)
    fails("thin has hidden size 24, the encoder was trained on 32", backbone=thin, allow_other_backbone=True)
    fails("small has 200 token embeddings, the encoder's tokenizer 259", backbone=small, allow_other_backbone=True)
    write(Path("lora"), tiny_backbone("llama"), LORA)
    deep = narrow(Path("deep"), num_hidden_layers=4)
    fails("tensors, the adapter on this backbone has", path="lora", backbone=deep, allow_other_backbone=True)


def test_a_local_backbone_that_is_gone(folder: Path) -> None:
    for name in ("models/llm", "/models/gone/llm"):
        change(backbone={"name": name, "sha256": "0" * 64})
        fails(f"backbone is the folder {name}, which is not here: say where .* --backbone PATH", BackboneError)


def test_a_revision_that_is_missing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The hub cannot be reached in tests, and nothing is in its cache."""
    change(backbone={"name": "org/llm", "revision": COMMIT})
    fails(
        f"cannot load backbone 'org/llm' at revision {COMMIT}: .*; say where a copy of it is by --backbone",
        BackboneError,
    )
    assert caplog.messages == []
    change(backbone={"name": "org/llm", "revision": "main"})
    fails("cannot load backbone 'org/llm' at revision main", BackboneError)
    assert "org/llm is recorded at revision main, which is no commit" in caplog.text


@pytest.mark.parametrize(
    ("place", "recorded", "outcome"),
    [
        (COMMIT, COMMIT, "same"),
        (OTHER_COMMIT, COMMIT, "other"),
        ("llm", COMMIT, "unknown"),
        (COMMIT, "main", "unknown"),
    ],
)
def test_a_copy_of_a_backbone_of_the_hub(
    folder: Path,
    tiny_backbone: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    place: str,
    recorded: str,
    outcome: str,
) -> None:
    """A folder of the hub's cache is called after its commit; of another one nobody knows."""
    shutil.copytree(tiny_backbone("llama"), place)
    change(backbone={"name": "org/llm", "revision": recorded})
    with caplog.at_level(logging.WARNING):
        if outcome == "other":
            fails(f"has revision {OTHER_COMMIT}, the encoder was trained on org/llm, revision {COMMIT}", backbone=place)
            return
        assert check_backbone(read_config(folder), place) is None
        assert read_encoder(folder, backbone=place).encode(["q"]).shape == (1, 5)
    assert ("cannot be checked against org/llm" in caplog.text) == (outcome == "unknown")
