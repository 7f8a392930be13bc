"""What the student is measured against: pooling of the backbone, HyDE, sentence-transformers models."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.template import TEMPLATES
from pipeline.evaluate import embedding_cache
from pipeline.evaluate.baselines import HydeSystem, ModelSystem, pooled
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.system import revision_of
from pipeline.generate.answer_cache import Answers
from pipeline.generate.engines.base import EngineSetup
from pipeline.generate.engines.echo import EchoEngine
from pipeline.generate.params import GenerateParams
from tests.conftest import tiny_model, tiny_tokenizer

TEXTS = ["abc", "a longer text", "x"]


def encoder_of(model: Any, tokenizer: Any, max_tokens: int) -> Any:
    config = SimpleNamespace(backbone={"name": "lm", "sha256": "0"})
    return SimpleNamespace(model=model, tokenizer=tokenizer, max_tokens=max_tokens, config=config)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """An encoder's backbone whose tokenizer makes a token of each letter."""
    return encoder_of(tiny_model("llama"), tiny_tokenizer(), max_tokens=32)


def mean_of(model: Any, ids: Sequence[int], chosen: slice) -> np.ndarray:
    """The mean of the last hidden states of one sequence over the chosen positions."""
    import torch

    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
    return hidden[chosen].float().mean(0).numpy()


def test_echo_pools_the_second_reading(tiny: Any) -> None:
    system = pooled("echo", tiny)
    embedded = system.encode(TEXTS, "Generate:")
    for row, text in zip(embedded, TEXTS, strict=True):
        ids = tiny.tokenizer(f"Rewrite the sentence: {text}, rewritten sentence: {text}")["input_ids"]
        np.testing.assert_allclose(row, mean_of(tiny.model, ids, slice(-len(text), None)), atol=1e-5)
    assert system.prompting == f"bare text twice: {TEMPLATES['echo']!r}, pooled over the second"


def test_backbone_mean_pools_the_only_reading(tiny: Any) -> None:
    system = pooled("backbone-mean", tiny)
    embedded = system.encode(TEXTS, "Generate:")
    for row, text in zip(embedded, TEXTS, strict=True):
        np.testing.assert_allclose(row, mean_of(tiny.model, tiny.tokenizer(text)["input_ids"], slice(None)), atol=1e-5)
    assert system.prompting == "bare text"
    assert revision_of(system) != revision_of(pooled("echo", tiny))


def test_echo_reads_as_much_of_a_text_as_the_student_twice(tiny: Any) -> None:
    long = "z" * 40
    np.testing.assert_allclose(
        pooled("echo", tiny).encode([long], ""), pooled("echo", tiny).encode(["z" * 32], ""), atol=1e-6
    )
    frame = len("Rewrite the sentence: , rewritten sentence: ")
    assert pooled("echo", tiny).identity["max_tokens"] == frame + 64


def test_echo_keeps_to_the_positions_of_the_backbone(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        system = pooled("echo", encoder_of(tiny.model, tiny.tokenizer, max_tokens=500))
    assert system.identity["max_tokens"] == 512
    assert "echo: 512 tokens for both copies of a text (the backbone's positions), not 1044" in caplog.text
    assert system.encode(["z" * 600], "").shape == (1, 32)


@pytest.mark.models
def test_echo_on_a_real_backbone_pools_the_second_reading_by_hand(small_lm: Path) -> None:
    from pipeline.backbone.loading import load_backbone, load_tokenizer

    params = BackboneParams(name=str(small_lm), dtype="float32")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    texts = ["The cat sat on the mat.", "Photosynthesis turns light into sugar, in leaves."]
    embedded = pooled("echo", encoder_of(model, tokenizer, max_tokens=64)).encode(texts, "")
    for row, text in zip(embedded, texts, strict=True):
        before = tokenizer(f"Rewrite the sentence: {text}, rewritten sentence:")["input_ids"]
        ids = tokenizer(f"Rewrite the sentence: {text}, rewritten sentence: {text}")["input_ids"]
        assert ids[: len(before)] == before
        np.testing.assert_allclose(row, mean_of(model, ids, slice(len(before), None)), rtol=1e-3, atol=1e-3)


# --- HyDE -----------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """Answers that are given, and none to all else."""

    given: dict[str, str]
    identity: dict[str, Any] = field(default_factory=lambda: {"backbone": "lm"})

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        return [self.given.get(prompt) for prompt in prompts]


@dataclass
class Reading:
    """A teacher that embeds a text as its length and keeps what it read."""

    width: int = 1
    identity: dict[str, Any] = field(default_factory=lambda: {"name": "teacher"})
    read: list[str] = field(default_factory=list)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.read += texts
        return np.array([[len(text)] for text in texts], np.float32)


def hyde(answers: Any, teacher: Any) -> HydeSystem:
    return HydeSystem(answers, teacher, "answers")


def test_hyde_embeds_the_answer_to_a_query_and_a_document_itself() -> None:
    teacher = Reading()
    system = hyde(Known({"Generate: why?": "because", "why?": "so"}), teacher)
    assert system.encode(["why?"], "Generate:").tolist() == [[7.0]]
    assert system.encode(["why?"], "", "query").tolist() == [[2.0]]
    assert system.encode(["why?"], "Summarize:", "document").tolist() == [[4.0]]
    assert teacher.read == ["because", "so", "why?"]


def test_hyde_embeds_a_query_itself_where_no_answer_came(caplog: pytest.LogCaptureFixture) -> None:
    teacher = Reading()
    system = hyde(Known({"a": "  \n", "b": "fine"}), teacher)
    system.encode(["a", "b", "c"], "")
    assert teacher.read == ["a", "fine", "c"]
    assert system.failed == 1
    assert "hyde: 2 of 3 answers are blank or failed: the text itself is embedded" in caplog.text


def test_the_engine_starts_once_for_all_chunks_of_a_call(
    tmp_path: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[EngineSetup] = []
    load = EchoEngine.load

    def counted(setup: EngineSetup) -> EchoEngine:
        starts.append(setup)
        return load(setup)

    monkeypatch.setattr(EchoEngine, "load", counted)
    monkeypatch.setattr(embedding_cache, "CHUNK_TEXTS", 2)
    params = GenerateParams(engine="echo", dtype="float32", max_new_tokens=32, max_prompt_tokens=40)
    backbone = BackboneParams(name=str(tiny_backbone("llama")), dtype="float32")
    teacher = Reading()
    answers = Answers.of(backbone, params, tmp_path / "answers", keeps_engine=False)
    cached = CachedSystem(hyde(answers, teacher), tmp_path / "embeddings")
    with closing(cached):
        found = cached.encode(["a", "bb", "ccc", "dddd", "eeeee"], "Tell:")
    assert found.tolist() == [[len("stub answer: Tell: ") + length] for length in range(1, 6)]
    assert len(starts) == 1
    assert len(teacher.read) == 5


def test_a_query_that_the_engine_failed_on_is_asked_once_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    class Recorded(Known):
        def __call__(self, prompts: Sequence[str]) -> list[str | None]:
            asked.append(list(prompts))
            return super().__call__(prompts)

    monkeypatch.setattr(embedding_cache, "CHUNK_TEXTS", 2)
    system = hyde(Recorded({"a": "long answer", "ccc": "short"}), Reading())
    with closing(CachedSystem(system, tmp_path)) as cached:
        for _ in range(2):
            assert cached.encode(["a", "bb", "ccc"], "").tolist() == [[11.0], [2.0], [5.0]]
        cached.encode(["d"], "", "document")
    # The whole call, then its chunks; the chunk of the failed query is not kept, so the next call asks again.
    assert asked == [["a", "bb", "ccc"], ["ccc"], ["a"], ["bb", "ccc"], ["ccc"]]
    assert system.failed == 2


def test_hyde_reads_a_text_differently_on_each_side() -> None:
    system = hyde(Known({}), Reading())
    readings = {
        system.cache_key("why?", "", "query"),
        system.cache_key("why?", "", "document"),
        system.cache_key("why?", "Generate:", "query"),
    }
    assert len(readings) == 3
    assert system.cache_key("why?", "Summarize:", "document") == system.cache_key("why?", "", "document")


def test_hyde_is_another_with_another_teacher_or_other_answers() -> None:
    systems = [
        hyde(Known({}), Reading()),
        hyde(Known({}), Reading(identity={"name": "other"})),
        hyde(Known({}, identity={"backbone": "other"}), Reading()),
    ]
    assert len({revision_of(system) for system in systems}) == 3


def test_hyde_with_the_engine_of_the_params(tmp_path: Path, tiny_backbone: Callable[..., Path]) -> None:
    params = GenerateParams(engine="echo", dtype="float32", max_new_tokens=32, max_prompt_tokens=40)
    backbone = BackboneParams(name=str(tiny_backbone("llama")), dtype="float32")
    teacher = Reading()
    system = hyde(Answers.of(backbone, params, tmp_path), teacher)
    system.encode(["why?"], "Tell me:")
    assert teacher.read == ["stub answer: Tell me: why?"]
    assert system.identity["answers"]["generate"]["stub"] is True


# --- sentence-transformers models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static vectors, one a letter, with a prompt for each side."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("static")
    static = StaticEmbedding(tiny_tokenizer(), embedding_dim=8)
    prompts = {"query": "ask ", "document": "tell "}
    SentenceTransformer(modules=[static], prompts=prompts, device="cpu").save(str(folder))
    return folder


def model(folder: Path | str, **changes: Any) -> ModelSystem:
    settings: dict[str, Any] = {"revision": None, "max_tokens": 64, "dtype": "float32", "batch_size": 2, **changes}
    return ModelSystem("letters", str(folder), **settings)


def test_a_model_reads_each_side_with_its_own_prompt(model_folder: Path) -> None:
    own, bare = model(model_folder), model(model_folder, query_prompt="", document_prompt="")
    np.testing.assert_array_equal(own.encode(TEXTS, "x"), bare.encode([f"ask {text}" for text in TEXTS], ""))
    np.testing.assert_array_equal(
        own.encode(TEXTS, "x", "document"), bare.encode([f"tell {text}" for text in TEXTS], "", "document")
    )
    assert own.prompting == "query prompt 'ask ', document prompt 'tell '"
    assert bare.prompting == "bare text"
    assert own.name == "letters" and own.encode([], "").shape == (0, 8)


def test_a_given_prompt_replaces_the_models_own(model_folder: Path) -> None:
    given, bare = model(model_folder, query_prompt="say "), model(model_folder, query_prompt="")
    np.testing.assert_array_equal(given.encode(["abc"], ""), bare.encode(["say abc"], ""))
    assert given.prompting == "query prompt 'say ', document prompt 'tell '"
    assert len({revision_of(each) for each in (given, bare, model(model_folder))}) == 3


def test_equal_readings_are_equal_embeddings(model_folder: Path) -> None:
    own, bare = model(model_folder), model(model_folder, query_prompt="", document_prompt="")
    assert own.cache_key("a", "x", "query") == own.cache_key("a", "y", "query") != own.cache_key("a", "x", "document")
    assert bare.cache_key("a", "x", "query") == bare.cache_key("a", "x", "document")


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="^name: .*does not exist"):
        model(tmp_path / "nothing")


@pytest.mark.models
def test_a_real_model_without_prompts_embeds_as_it_does_itself(small_teacher: Path) -> None:
    from sentence_transformers import SentenceTransformer

    system = model(small_teacher, max_tokens=512)
    texts = ["A cat.", "The bond market fell.", ""]
    direct = SentenceTransformer(str(small_teacher), device="cpu").encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(system.encode(texts, "Generate:"), direct, atol=1e-6)
    assert system.prompting == "bare text" and system.identity["max_tokens"] == 256
