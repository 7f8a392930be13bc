"""Both phases on a tiny backbone: standard adapters, resume, and what is refused before any training."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError, TrainingError
from pipeline.embed.teachers.adapters import AdapterParams
from pipeline.embed.teachers.llm2vec import load_llm2vec
from pipeline.teach import loop
from tests.stage_runs import folder_bytes
from tests.teach.helpers import params, recipe, two_clusters

TEXTS = two_clusters(24)


def contents(finished: Any) -> list[dict[str, bytes]]:
    return [folder_bytes(phase.adapter) for phase in finished.values()]


def teacher_of(base: BackboneParams, adapters: list[str]) -> Any:
    named = [AdapterParams(name=adapter) for adapter in adapters]
    return load_llm2vec(base, named, max_tokens=64, dtype=base.dtype)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "olmo2"])
def test_the_adapters_load_in_peft_and_in_the_teacher_alike(
    architecture: str, tiny_backbone: Callable[..., Path], workspace: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_backbone(architecture)
    mntp, simcse = recipe(folder, TEXTS, workspace, params()).run().values()
    assert len(mntp.curve) == len(simcse.curve) == 6
    base = BackboneParams(name=str(folder), dtype="float32")
    names = [str(phase.adapter) for phase in (mntp, simcse)]
    teacher = teacher_of(base, names)
    model: Any = AutoModel.from_pretrained(folder)
    for name in names:
        wrapped: Any = PeftModel.from_pretrained(model, name)
        model = wrapped.merge_and_unload()
    model.eval()
    model.config.is_causal = model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        plain = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS[:4]]
    np.testing.assert_allclose(teacher.embed(TEXTS[:4]), torch.stack(plain).numpy(), atol=1e-4, rtol=1e-3)


def test_a_finished_phase_is_not_trained_again(
    tiny_backbone: Callable[..., Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_backbone()
    before = contents(recipe(folder, TEXTS, workspace, params()).run())
    monkeypatch.setattr("pipeline.teach.recipe.load_backbone", None)
    assert contents(recipe(folder, TEXTS, workspace, params()).run()) == before


def test_other_params_of_simcse_keep_mntp(tiny_backbone: Callable[..., Path], workspace: Path) -> None:
    first = recipe(tiny_backbone(), TEXTS, workspace, params()).run()
    second = recipe(tiny_backbone(), TEXTS, workspace, params(simcse={"scale": 10.0})).run()
    assert first["mntp"].adapter == second["mntp"].adapter
    assert first["simcse"].adapter != second["simcse"].adapter
    assert contents(first)[1] != contents(second)[1]


def test_half_precision_trains_float32_adapters(tiny_backbone: Callable[..., Path], workspace: Path) -> None:
    from safetensors.torch import load_file

    settings = params().model_copy(update={"dtype": "bfloat16"})
    mntp, simcse = recipe(tiny_backbone("qwen3"), TEXTS, workspace, settings).run().values()
    assert np.isfinite([*mntp.curve, *simcse.curve]).all()
    for phase in (mntp, simcse):
        weights = load_file(phase.adapter / "adapter_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(value.isfinite().all() and value.any() for value in weights.values())
    base = BackboneParams(name=str(tiny_backbone("qwen3")), dtype="bfloat16")
    teacher = teacher_of(base, [str(phase.adapter) for phase in (mntp, simcse)])
    assert np.isfinite(teacher.embed(TEXTS[:4])).all()


def test_an_architecture_that_drops_nothing_warns(
    tiny_backbone: Callable[..., Path],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pipeline.teach.dropout._attention_key", lambda module: None)
    recipe(tiny_backbone(), TEXTS, workspace, params(simcse={"lora": {"dropout": 0.1}})).run()
    assert "simcse.dropout (0.3) has no effect" in caplog.text
    assert "simcse.lora.dropout (0.1)" in caplog.text


@pytest.mark.parametrize("stop_at", [3, 9])
def test_stopped_in_either_phase_it_goes_on_to_the_same_bytes(
    stop_at: int, tiny_backbone: Callable[..., Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = params(mntp={"lora": {"dropout": 0.2}})
    whole = contents(recipe(tiny_backbone(), TEXTS, workspace / "whole", settings).run())
    step, taken = loop.Loop._step, []

    def interrupted(self: Any, number: int) -> float:
        taken.append(number)
        if len(taken) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(loop.Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe(tiny_backbone(), TEXTS, workspace / "killed", settings).run()
    torch.rand(7)  # nobody draws from the global generator
    assert contents(recipe(tiny_backbone(), TEXTS, workspace / "killed", settings).run()) == whole
    assert len(taken) == 12


def test_a_damaged_checkpoint_starts_the_phase_again(
    tiny_backbone: Callable[..., Path], workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(recipe(tiny_backbone(), TEXTS, workspace, params()).run())
    for finished in workspace.glob("*/finished"):
        (finished.parent / "checkpoint").write_bytes(b"half of it")
        finished.rename(finished.with_name("away"))
    assert contents(recipe(tiny_backbone(), TEXTS, workspace, params()).run()) == whole
    assert "is damaged: training starts again" in caplog.text


def test_a_damaged_phase_is_trained_again(
    tiny_backbone: Callable[..., Path], workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(recipe(tiny_backbone(), TEXTS, workspace, params()).run())
    [weights] = workspace.glob("mntp-*/finished/adapter/adapter_model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert contents(recipe(tiny_backbone(), TEXTS, workspace, params()).run()) == whole
    assert "adapter_model.safetensors: sha256 is" in caplog.text
    assert "the phase is trained again" in caplog.text


def test_a_backbone_that_stays_causal_is_refused(
    tiny_backbone: Callable[..., Path], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teach.recipe.make_bidirectional", lambda body: None)
    with pytest.raises(TeacherError, match="is causal in a text alone"):
        recipe(tiny_backbone(), TEXTS, workspace, params()).run()
    assert not list(workspace.rglob("checkpoint"))


def test_mistakes_name_their_key(tiny_backbone: Callable[..., Path], workspace: Path) -> None:
    folder = tiny_backbone()
    with pytest.raises(TeacherError, match=r"^mntp\.batch_size: 4 .* 3 usable texts of 4 \(1 too short"):
        recipe(folder, ["x", "ab", "cd", "ef"], workspace, params()).run()
    with pytest.raises(TeacherError, match=r"0 usable texts of 4 \(4 too short"):
        recipe(folder, ["x", "y", "z", "w"], workspace, params()).run()
    alike = [f"{'a' * 48} {end}" for end in "abcdefgh"]
    with pytest.raises(TeacherError, match=r"1 usable texts of 8 .* 7 with the tokens of another"):
        recipe(folder, alike, workspace, params()).run()
    with pytest.raises(TeacherError, match=r"^mntp\.mask_token"):
        recipe(folder, TEXTS, workspace, params(mntp={"mask_token": "no token"}))
    for phase in ("mntp", "simcse"):
        with pytest.raises(TeacherError, match=rf"^{phase}\.max_tokens: 600 .* 512"):
            recipe(folder, TEXTS, workspace, params(**{phase: {"max_tokens": 600}}))
    with pytest.raises(TrainingError, match=r"targets.*\['nothing'\]"):
        recipe(folder, TEXTS, workspace, params(simcse={"lora": {"targets": ["nothing"]}})).run()
    with pytest.raises(TeacherError, match=r"^mntp\.learning_rate: step \d+ is not finite .* lower 1e\+30"):
        recipe(folder, TEXTS, workspace, params(mntp={"learning_rate": 1e30})).run()
