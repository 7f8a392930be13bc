"""A backbone shared out over two processes trains as one that is whole."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.backbone.sharding import bytes_of, decoder_layers, load_sharded, shard
from pipeline.core.errors import BackboneError
from pipeline.parallel.launch import launch_ranks
from tests.backbone.sharded_run import run
from tests.conftest import ROOT, tiny_model


def test_the_layers_are_found_by_the_name_that_the_model_gives_them() -> None:
    for architecture in ("llama", "qwen3", "gemma3"):
        backbone = tiny_model(architecture)
        assert decoder_layers(backbone) == list(backbone.get_decoder().layers)


def test_a_model_without_names_for_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_model()
    monkeypatch.setattr(backbone, "_no_split_modules", None)
    with pytest.raises(BackboneError, match="backbone: LlamaForCausalLM does not name its layers"):
        decoder_layers(backbone)


def test_a_backbone_that_is_trained_is_refused() -> None:
    backbone = tiny_model()
    next(backbone.parameters()).requires_grad_(True)
    with pytest.raises(BackboneError, match="unset lora"):
        shard(backbone, Accelerator(cpu=True))


def test_one_process_holds_the_whole(tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.backbone.loading import BackboneParams

    backbone = load_sharded(BackboneParams(name=str(tiny_backbone()), dtype="float32"), Accelerator(cpu=True))
    assert "there is one process" in caplog.text
    assert all(torch.equal(*pair) for pair in zip(backbone.parameters(), tiny_model().parameters(), strict=True))


def test_tied_embeddings_count_once() -> None:
    backbone = tiny_model("gemma3")  # head and embeddings are one tensor [260, 32] in fp32
    assert bytes_of([backbone]) == bytes_of([backbone.get_decoder()])
    assert bytes_of([backbone.get_input_embeddings(), backbone.get_output_embeddings()]) == 260 * 32 * 4


def test_layers_hold_85_percent_of_qwen3_8b() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert bytes_of(decoder_layers(backbone)) / bytes_of([backbone]) == pytest.approx(0.848, abs=5e-4)


@pytest.mark.slow
def test_two_processes_with_half_the_layers_each_take_the_steps_of_one(
    tiny_backbone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, fast and checkpointed passes, qwen3 and gemma3, with fewer rows and an empty pass on one process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folders = [tiny_backbone("qwen3"), tiny_backbone("gemma3")]
    run(folders, tmp_path / "one.npz", Accelerator(cpu=True))
    launch_ranks("tests.backbone.sharded_run", [str(tmp_path / "two.npz"), *map(str, folders)], 2)
    alone, shared = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert set(alone) == set(shared)
    assert len(alone) == 2 * (3 * 6 + 1)
    for name in alone:
        if name.endswith("kept"):
            assert (alone[name], shared[name]) == (1.0, pytest.approx(0.5, abs=0.02))
        else:
            np.testing.assert_allclose(shared[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in (name for name in alone if name.endswith("losses")):
        assert alone[name][-1] < alone[name][0]
