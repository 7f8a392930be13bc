"""Presets are the paper's, and switching to one changes nothing else in the file."""

from pathlib import Path

import pytest

from pipeline.errors import ParamsError
from pipeline.params import read_yaml
from pipeline.presets import preset_of, presets, switch
from tests.conftest import ROOT

BILLIONS = {
    "qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62,
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03,
}  # fmt: skip

PARAMS = """\
# the top comment
backbone:
  name: models/own   # mine
  revision: null     # unpinned
  dtype: float32
  chat_template_kwargs: {}

# about training
train:
  learning_rate: 1e-4  # tuned
  batch_size: 16
  micro_batch_size: 3
suites:
  demo: {local: [a, b], benchmark: "MTEB(eng, v2)"}
"""


@pytest.fixture
def params(workspace: Path) -> Path:
    path = workspace / "params.yaml"
    path.write_text(PARAMS)
    return path


def test_sizes_follow_from_the_shapes() -> None:
    assert {name: round(preset.shape.parameters() / 1e9, 2) for name, preset in presets().items()} == BILLIONS


def test_learning_rates_are_the_papers() -> None:
    for name, preset in presets().items():
        assert preset.learning_rate == (3e-4 if name.startswith("qwen3-") else 5e-4)


def test_revisions_are_commits_or_open() -> None:
    for preset in presets().values():
        revision = preset.backbone.revision
        assert revision is None or (len(revision) == 40 and int(revision, 16))


def test_switching_sets_the_preset_and_keeps_the_rest(params: Path) -> None:
    changes = switch(params, "qwen3-4b", 24)
    text = params.read_text()
    for comment in ("# the top comment", "# mine", "# unpinned", "# about training", "# tuned"):
        assert comment in text
    content = read_yaml(params)
    assert content["backbone"] == presets()["qwen3-4b"].backbone.model_dump(exclude={"trust_remote_code"})
    assert content["train"] == {"learning_rate": 3e-4, "batch_size": 16, "micro_batch_size": 4}
    assert content["suites"] == {"demo": {"local": ["a", "b"], "benchmark": "MTEB(eng, v2)"}}
    assert 'demo: {local: [a, b], benchmark: "MTEB(eng, v2)"}' in text
    assert changes[0] == "backbone.name: models/own -> Qwen/Qwen3-4B"
    assert len(changes) == 6


def test_switching_twice_changes_nothing(params: Path) -> None:
    switch(params, "llama-3.1-8b", 80)
    before = params.read_bytes()
    assert switch(params, "llama-3.1-8b", 80) == []
    assert params.read_bytes() == before


def test_there_and_back_restores_the_real_params(workspace: Path) -> None:
    real = (ROOT / "params.yaml").read_text()
    path = workspace / "params.yaml"
    path.write_text(real)
    switch(path, "qwen2.5-0.5b", 80)
    assert "Qwen/Qwen2.5-0.5B-Instruct" in path.read_text()
    switch(path, "qwen3-4b", 80)
    assert path.read_text() == real


def test_mistakes_are_named(params: Path) -> None:
    with pytest.raises(ParamsError, match=r"unknown backbone 'gpt' \(known: qwen3-0.6b"):
        switch(params, "gpt", 80)
    with pytest.raises(ParamsError, match="--memory 48: known are 24, 80"):
        switch(params, "qwen3-4b", 48)
    params.write_text("backbone: {name: a}\n")
    with pytest.raises(ParamsError, match="train: missing"):
        switch(params, "qwen3-4b", 80)
    with pytest.raises(ParamsError, match="does not exist"):
        switch(params.with_name("none.yaml"), "qwen3-4b", 80)


def test_a_preset_is_found_by_its_backbone() -> None:
    found = preset_of("Qwen/Qwen3-8B")
    assert found is presets()["qwen3-8b"]
    assert preset_of("models/own") is None
