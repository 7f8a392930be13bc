from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.encoder.config import EncoderConfig
from pipeline.errors import ParamsError
from pipeline.evaluation.suites import SuiteParams
from pipeline.evaluation.systems import BareSystem, EvaluateParams, InstructedSystem, Systems, revision_of
from pipeline.params import validate
from pipeline.prompts import join_instruction

CONFIG = EncoderConfig(
    backbone={"name": "lm", "sha256": "0"}, chat_template_kwargs={}, template="raw", max_query_tokens=8,
    compression_tokens=2, thought_tokens=0, hidden=4, width=1, teacher={},
)  # fmt: skip


@dataclass
class LengthEncoder:
    """Embeds a prompt as its length; `offset` stands for the student."""

    offset: int = 0
    config: EncoderConfig = CONFIG
    max_tokens: int = 8
    model: Any = "the backbone"
    tokenizer: Any = None
    loads: list[Path] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "untrained" if self.offset else "encoder"}

    def encode(self, texts: Any, *, instruction: str = "", batch_size: int = 32) -> np.ndarray:
        return np.array([[len(join_instruction(instruction, text)) + self.offset] for text in texts], np.float32)

    def untrained(self, seed: int) -> "LengthEncoder":
        return LengthEncoder(offset=1000 + seed)


class LengthTeacher:
    """Embeds a text as minus its length."""

    width, identity = 1, {"name": "teacher"}

    def embed(self, texts: Any) -> np.ndarray:
        return np.array([[-len(text)] for text in texts], np.float32)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> LengthEncoder:
    import pipeline.encoder.inference as inference

    fake = LengthEncoder()

    def load(path: Path, **_: Any) -> LengthEncoder:
        fake.loads.append(path)
        return fake

    monkeypatch.setattr(inference, "Encoder", SimpleNamespace(load=load))
    return fake


def systems(**changes: Any) -> Systems:
    arguments: dict[str, Any] = dict(
        encoder_dir=Path("models/encoder"),
        load_teacher=LengthTeacher,
        device="cpu",
        dtype="float32",
        batch_size=2,
        seed=3,
    )
    return Systems(**{**arguments, **changes})


def test_each_system_has_its_own_prompting(encoder: LengthEncoder) -> None:
    built = {system.name: system for system in systems().build(["student", "teacher", "untrained"])}
    values = {name: system.encode(["ab"], "Generate:")[0, 0] for name, system in built.items()}
    assert values == {"student": 12, "teacher": -2, "untrained": 1015}
    assert {name: system.prompting for name, system in built.items()} == {
        "student": "generative instruction", "teacher": "bare text", "untrained": "generative instruction",
    }  # fmt: skip


def test_the_backbone_is_loaded_once_and_only_when_needed(encoder: LengthEncoder) -> None:
    made = systems()
    (teacher,) = made.build(["teacher"])
    assert not encoder.loads and isinstance(teacher, BareSystem)
    list(made.build(["student", "untrained", "student"]))
    assert encoder.loads == [Path("models/encoder")]


def test_backbone_mean_pools_the_same_loaded_model(encoder: LengthEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("pipeline.teachers.backbone_teacher")
    seen: list[Any] = []

    def make(model: Any, tokenizer: Any, **_: Any) -> LengthTeacher:
        seen.append(model)
        return LengthTeacher()

    monkeypatch.setattr(module, "BackboneTeacher", make)
    (system,) = systems().build(["backbone-mean"])
    assert seen == ["the backbone"]
    assert system.encode(["abc"], "Generate:")[0, 0] == -3
    assert system.prompting == "bare text" and system.identity["backbone"] == {"name": "lm", "sha256": "0"}


def test_a_teacher_with_a_prompt_says_so(encoder: LengthEncoder) -> None:
    (system,) = systems(teacher_prompt="passage: ").build(["teacher"])
    assert system.prompting == "own prompt 'passage: '"


def test_a_revision_follows_weights_prompting_and_conditions(encoder: LengthEncoder) -> None:
    def revision(**changes: Any) -> str:
        made = dict(name="student", identity={"sha256": "a"}, encoder=encoder, batch_size=2, prompting="x")
        return revision_of(InstructedSystem(**{**made, **changes}), dtype="float32")

    assert revision() == revision(batch_size=9)
    assert len({revision(), revision(identity={"sha256": "b"}), revision(prompting="y")}) == 3
    assert len(revision()) == 40


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "names no task"),
        ({"local": [], "benchmark": None}, "names no task"),
        ({"task": ["STS12"]}, r"task: unknown key \(did you mean 'tasks'\?\)"),
        ({"tasks": "STS12"}, "tasks: Input should be a valid list"),
    ],
)
def test_suites_are_checked(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        validate(entry, SuiteParams, where="params.yaml")


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"systems\.0"):
        validate({"systems": ["pupil"], "local_dir": "x"}, EvaluateParams, where="params.yaml")


def test_the_real_encoder_stands_behind_all_three_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.student import new_student
    from tests.conftest import tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    config = CONFIG.model_copy(update={"max_query_tokens": 32, "hidden": 32, "width": 5})
    student = new_student(model, 5, compression_tokens=2, thought_tokens=0, seed=1)
    encoder = Encoder(model, tiny_tokenizer(), student, config, {"name": "tiny"})
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: encoder)
    built = {system.name: system for system in systems().build(["student", "untrained", "backbone-mean"])}
    texts = ["a", "a longer text", ""]
    values = {name: system.encode(texts, "Generate:") for name, system in built.items()}
    assert {name: value.shape for name, value in values.items()} == {
        "student": (3, 5),
        "untrained": (3, 5),
        "backbone-mean": (3, 32),
    }
    np.testing.assert_array_equal(values["student"], encoder.encode(texts, instruction="Generate:", batch_size=2))
    assert np.abs(values["student"] - values["untrained"]).max() > 1e-3
    assert len({revision_of(system) for system in built.values()}) == 3
