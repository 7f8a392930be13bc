import importlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pipeline.evaluate.build as module
from pipeline.backbone.prompting import join_instruction
from pipeline.core.artifacts import open_artifact
from pipeline.core.config import validate
from pipeline.core.errors import TeacherError, TrainingError
from pipeline.core.target_transform import TargetTransform
from pipeline.embed.__main__ import app as embed_app
from pipeline.embed.params import TeacherParams, TeacherSection
from pipeline.encoder.folder.config import START_FILE, EncoderConfig
from pipeline.evaluate.build import SystemInputs, Systems, make_answers, make_systems, manifest_params, own_instructions
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.run import run_systems
from pipeline.evaluate.system import BareSystem, InstructedSystem, System, revision_of
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks
from tests.conftest import tiny_tokenizer
from tests.encoder.test_inference import write as write_encoder
from tests.evaluate.fakes import LiveParameters, ModelTeacher, retrieval_folder, sts_folder
from tests.export.encoder_folders import write_folder
from tests.stage_runs import row_id, write_params, write_queries, write_responses

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
    model: Any = field(default_factory=lambda: SimpleNamespace(get_decoder=lambda: "the backbone"))
    tokenizer: Any = field(default_factory=tiny_tokenizer)
    loads: list[Path] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "untrained" if self.offset else "encoder"}

    def encode(self, texts: Any, *, instruction: str = "", batch_tokens: int | None = None) -> np.ndarray:
        return np.array([[len(join_instruction(instruction, text)) + self.offset] for text in texts], np.float32)

    def untrained(self, seed: int) -> "LengthEncoder":
        return LengthEncoder(offset=1000 + seed)


@dataclass
class Answers:
    """Answers with three exclamation marks."""

    keeps_engine: bool = True
    closed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"answers": "!!!"}

    def __call__(self, prompts: Any) -> list[str]:
        return ["!!!" for _ in prompts]

    def close(self) -> None:
        self.closed += 1


@dataclass
class LengthTeacher:
    """Embeds a text as minus its length."""

    identity: dict[str, Any] = field(default_factory=lambda: {"name": "teacher"})
    width: int = 1

    def embed(self, texts: Any) -> np.ndarray:
        return np.array([[-len(text)] for text in texts], np.float32)


@pytest.fixture
def encoder_on_disk(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    write_encoder(Path("models/encoder"), tiny_backbone("qwen3"), None)
    return Path("models/encoder")


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> LengthEncoder:
    import pipeline.encoder.folder.read as folder

    fake = LengthEncoder()

    def load(path: Path, **options: Any) -> LengthEncoder:
        fake.loads.append(path)
        fake.options.update(options)
        return fake

    monkeypatch.setattr(folder, "read_encoder", load)
    return fake


def systems(**changes: Any) -> Systems:
    arguments: dict[str, Any] = dict(
        encoder_dir=Path("models/encoder"),
        open_teacher=lambda: nullcontext(LengthTeacher()),
        answers=Answers(),
        device="cpu",
        dtype="float32",
        seeds=[3],
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
    from pipeline.embed.teachers import pooling

    importlib.import_module("pipeline.embed.teachers.backbone")  # it must not import the fake

    seen: list[Any] = []

    def make(body: Any, tokenizer: Any, *, identity: dict[str, Any], **_: Any) -> LengthTeacher:
        seen.append(body)
        return LengthTeacher(identity=identity)

    monkeypatch.setattr(pooling, "PooledTeacher", make)
    (system,) = systems().build(["backbone-mean"])
    assert seen == ["the backbone"]
    assert system.encode(["abc"], "Generate:")[0, 0] == -3
    assert system.prompting == "bare text" and system.identity["backbone"] == {"name": "lm", "sha256": "0"}


def test_a_teacher_with_a_prompt_says_so_and_hyde_with_it(encoder: LengthEncoder) -> None:
    teacher, hyde = systems(teacher_prompt="passage: ").build(["teacher", "hyde"])
    assert teacher.prompting == "own prompt 'passage: '"
    assert hyde.prompting == (
        "queries: the backbone's answer to instruction and text; documents: bare text; both with own prompt 'passage: '"
    )


def test_hyde_asks_the_answers_that_it_is_given(encoder: LengthEncoder) -> None:
    answers = Answers()
    made = systems(answers=answers)
    (system,) = made.build(["hyde"])
    assert system.encode(["ab"], "Generate:")[0, 0] == -3
    assert system.encode(["ab"], "Summarize:", "document")[0, 0] == -2
    assert made.answers is answers and not answers.closed and not encoder.loads
    made.close()
    assert answers.closed == 1


@pytest.mark.parametrize("other", ["hyde", "teacher", "mini"])
def test_the_encoder_makes_room_for_other_models(encoder: LengthEncoder, other: str) -> None:
    models: Any = {"mini": lambda: BareSystem("mini", {}, LengthTeacher())}
    list(systems(models=models).build(["student", other, "untrained"]))
    assert len(encoder.loads) == 2


def test_one_model_is_in_memory_at_a_time(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write_encoder(Path("models/encoder"), tiny_backbone("qwen3"), None)
    names = ["student", "teacher", "untrained", "backbone-mean", "echo", "mini", "student"]
    count = LiveParameters()
    made = systems(
        open_teacher=lambda: nullcontext(ModelTeacher()),
        models={"mini": lambda: BareSystem("mini", {"name": "mini"}, ModelTeacher())},
        wrap=count.turn,
    )
    for system in made.build(names):
        assert system.encode(["why?"], "").shape[0] == 1
        del system
    assert list(count.models) == [*names[:-1]] and set(count.models.values()) == {1}


def test_each_seed_is_an_untrained_system(encoder: LengthEncoder) -> None:
    built = list(systems(seeds=[3, 0, 7]).build(["untrained", "teacher"]))
    assert [system.name for system in built] == ["untrained", "untrained-0", "untrained-7", "teacher"]
    assert [system.encode([""], "")[0, 0] for system in built] == [1003, 1000, 1007, 0]


def test_standardised_systems_are_fitted_on_the_training_texts(workspace: Path, encoder_on_disk: Path) -> None:
    names = ["untrained-standardized", "backbone-mean-standardized", "echo-standardized", "echo-decorrelated"]
    texts = ["one query", "another one", "and a third, which is longer"]
    made = systems(encoder_dir=encoder_on_disk, training_texts=lambda: texts, seeds=[3, 4])
    found = {system.name: (system.encode(texts, ""), system.prompting) for system in made.build(names)}
    assert list(found) == ["untrained-standardized", "untrained-standardized-4", *names[1:]]
    assert set(made.standardizations) == set(found)
    for name, (embeddings, prompting) in found.items():
        assert embeddings.shape == (3, 32)
        np.testing.assert_allclose(embeddings.mean(0), 0, atol=1e-4)
        assert embeddings.var(0).mean() == pytest.approx(1, abs=1e-3)
        how = "decorrelated" if name.endswith("decorrelated") else "standardised"
        assert f"{how} over training queries" in prompting
        if how == "standardised":
            np.testing.assert_allclose(embeddings.std(0), 1, atol=1e-3)


def test_the_untrained_student_is_standardised_as_training_did_it_where_that_read_the_same_way(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    folder, name, texts = write_folder(Path("trained"), tiny_backbone("qwen3")), "untrained-standardized", ["a", "b"]

    def transforms(**changes: Any) -> dict[str, Any]:
        made = systems(encoder_dir=folder, training_texts=lambda: texts, **changes)
        assert [system.encode(texts, "").shape for system in made.build([name])] == [(2, 32)] * len(made.seeds)
        return made.standardizations

    start = load_file(folder / START_FILE)
    found = transforms(seeds=[2, 3])
    np.testing.assert_array_equal(found[name].mean, start["reading.mean"])
    np.testing.assert_array_equal(found[name].forward, start["reading.scale"])
    np.testing.assert_allclose(found[name].inverse * found[name].forward, 1, rtol=1e-6)
    # Other new tokens read otherwise, and so does another precision.
    for other in (found[f"{name}-3"], transforms(seeds=[2], dtype="bfloat16")[name]):
        assert np.abs(other.mean - start["reading.mean"]).max() > 1e-3


def test_the_start_is_a_system_if_the_encoder_has_it(
    workspace: Path, encoder_on_disk: Path, tiny_backbone: Callable[..., Path]
) -> None:
    with pytest.raises(TrainingError, match=r"no start\.safetensors"):
        next(systems(encoder_dir=encoder_on_disk).build(["start"]))
    folder = write_folder(Path("trained"), tiny_backbone("qwen3"))
    start, student = systems(encoder_dir=folder).build(["start", "student"])
    assert start.name == "start" and start.identity["name"] == "start"
    assert np.abs(start.encode(["a"], "") - student.encode(["a"], "")).max() > 1e-3


def test_a_pass_of_the_start_embeds_for_the_untrained_students_that_read_as_it_does(
    workspace: Path,
    tiny_backbone: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from pipeline.encoder.inference import Encoder

    passes: list[int] = []
    read = Encoder._batched
    monkeypatch.setattr(Encoder, "_batched", lambda *args, **rest: passes.append(1) or read(*args, **rest))
    folder = write_folder(Path("trained"), tiny_backbone("qwen3"), share=0.3)
    names = ["start", "untrained", "untrained-standardized", "untrained-decorrelated"]
    texts = ["a", "a longer text", "b"]

    def embedded(root: Path | None) -> dict[str, np.ndarray]:
        made = systems(
            encoder_dir=folder,
            seeds=[2, 3],  # `write_folder` has the new tokens of seed 2
            wrap=lambda system: closing(CachedSystem(system, root)),
            training_texts=lambda: texts,
        )
        return {system.name: system.encode(texts, "Generate:") for system in made.build(names)}

    separate = embedded(None)
    before = len(passes)
    found = embedded(Path("kept"))
    assert list(found) == ["start", *(each for name in names[1:] for each in (name, f"{name}-3"))]
    for name, vectors in found.items():
        np.testing.assert_array_equal(vectors, separate[name])
    # Those of seed 2 find what the start has read, but for the training texts of the decorrelated one. Of seed 3 two
    # read the texts, one of them the training texts too, and the decorrelated one finds both.
    assert (before, len(passes) - before) == (10, 5)
    assert "without its cache" not in caplog.text


def test_models_come_by_their_keys_and_every_system_is_wrapped(encoder: LengthEncoder) -> None:
    seen: list[str] = []

    @contextmanager
    def wrap(system: System) -> Iterator[System]:
        seen.append(f"open {system.name}")
        yield system
        seen.append(f"close {system.name}")

    bare = BareSystem("mini", {"name": "mini"}, LengthTeacher())
    built = list(systems(models={"mini": lambda: bare}, wrap=wrap).build(["mini", "untrained"]))
    assert built[0] is bare
    assert seen == ["open mini", "close mini", "open untrained", "close untrained"]


def test_a_system_whose_turn_is_over_is_gone_before_the_next_is_loaded() -> None:
    alive: list[weakref.ref[Any]] = []

    def load() -> LengthTeacher:
        assert not [teacher for teacher in alive if teacher() is not None]
        teacher = LengthTeacher()
        alive.append(weakref.ref(teacher))
        return teacher

    turns = systems(open_teacher=lambda: nullcontext(load())).build(["teacher", "teacher"])
    for _ in range(2):
        next(turns)
    assert len(alive) == 2


def test_remote_code_is_the_callers_to_allow(encoder: LengthEncoder) -> None:
    systems(trust_remote_code=True).encoder()
    assert encoder.options == {"device": "cpu", "dtype": "float32", "trust_remote_code": True}


def test_a_revision_follows_weights_prompting_and_conditions(encoder: LengthEncoder) -> None:
    def revision(**changes: Any) -> str:
        made = dict(name="student", identity={"sha256": "a"}, encoder=encoder, prompting="x")
        return revision_of(InstructedSystem(**{**made, **changes}), dtype="float32")

    assert revision() == revision(batch_tokens=9)
    assert len({revision(), revision(identity={"sha256": "b"}), revision(prompting="y")}) == 3
    assert len(revision()) == 40


def test_the_real_encoder_stands_behind_all_three_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.student import new_student
    from tests.conftest import tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    config = CONFIG.model_copy(update={"max_query_tokens": 32, "hidden": 32, "width": 5})
    student = new_student(model, 5, compression_tokens=2, thought_tokens=0, seed=1)
    encoder = Encoder(model, tiny_tokenizer(), student, config, {"name": "tiny"})
    monkeypatch.setattr("pipeline.encoder.folder.read.read_encoder", lambda *_, **__: encoder)
    built = {system.name: system for system in systems().build(["student", "untrained", "backbone-mean"])}
    texts = ["a", "a longer text", ""]
    values = {name: system.encode(texts, "Generate:") for name, system in built.items()}
    assert {name: value.shape for name, value in values.items()} == {
        "student": (3, 5),
        "untrained": (3, 5),
        "backbone-mean": (3, 32),
    }
    np.testing.assert_array_equal(values["student"], encoder.encode(texts, instruction="Generate:"))
    assert np.abs(values["student"] - values["untrained"]).max() > 1e-3
    assert len({revision_of(system) for system in built.values()}) == 3


@pytest.mark.slow
def test_two_processes_evaluate_every_system_as_one(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    lm = tiny_backbone("qwen3")
    write_encoder(Path("models/encoder"), lm, None)
    folders = [retrieval_folder(Path("tasks/find")), sts_folder(Path("tasks/pairs"))]
    names = ["student", "untrained", "backbone-mean", "echo", "teacher"]
    content = {
        "backbone": {"name": str(lm), "dtype": "float32"},
        "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 64},
        "embed": {"teacher": {"kind": "backbone", "max_tokens": 64, "dtype": "float32"}},
    }
    results = []
    for processes in (1, 2):
        evaluate = {
            "systems": names,
            "dtype": "float32",
            "data_parallel": processes,
            "local_dir": "tasks",
        }
        inputs = validate({**content, "evaluate": evaluate}, SystemInputs, where="params.yaml")
        with closing(make_systems(inputs)) as made:
            results.append(
                run_systems(
                    made.build(names),
                    find_tasks(folders),
                    load_instructions(),
                    work=Path(f"work-{processes}"),
                    dtype="float32",
                )
            )
        shutil.rmtree(".work/embeddings")
    for one, two in zip(*results, strict=True):
        assert (one.system, one.meta, one.computed) == (two.system, two.meta, two.computed)
        scores = [[result.get_score() for result in run.results] for run in (one, two)]
        np.testing.assert_allclose(*scores, atol=1e-4)
    assert [run.system for run in results[1]] == names and results[1][0].meta.n_parameters > 10_000


# --- from the sections of params.yaml -----------------------------------------------------------------------------

BOTH = ["hyde", "teacher"]


@pytest.fixture
def inputs(workspace: Path, tiny_backbone: Callable[..., Path]) -> Callable[..., SystemInputs]:
    """Sections with a tiny backbone, the stub engine and the stub teacher; `changes` are of section `evaluate`."""

    def make(engine: str = "echo", **changes: object) -> SystemInputs:
        content = {
            "backbone": {"name": str(tiny_backbone("llama")), "dtype": "float32"},
            "generate": {"engine": engine, "dtype": "float32", "max_new_tokens": 32, "max_prompt_tokens": 64},
            "embed": {"teacher": {"kind": "hash"}, "normalize": False},
            "evaluate": {"systems": ["hyde", "teacher"], "local_dir": "tasks", "dtype": "float32", **changes},
        }
        return validate(content, SystemInputs, where="params.yaml")

    return make


def test_hyde_embeds_answers_of_the_engine_with_the_teacher(inputs: Callable[..., SystemInputs]) -> None:
    params = inputs(cache_embeddings=False)
    systems = make_systems(params)
    hyde, teacher = systems.build(params.evaluate.systems)
    answered = teacher.encode(["stub answer: Tell: why?"], "")
    assert (hyde.encode(["why?"], "Tell:") == answered).all()
    assert (hyde.encode(["why?"], "Tell:", "document") == teacher.encode(["why?"], "")).all()
    assert [path.name for path in Path(".work").iterdir()] == ["answers"]
    systems.close()


def test_embeddings_are_kept_unless_params_say_not(inputs: Callable[..., SystemInputs]) -> None:
    params = inputs()
    with closing(make_systems(params)) as systems:
        embedded = [system.encode(["why?"], "Tell:") for system in systems.build(params.evaluate.systems)]
    assert sorted(path.name for path in Path(".work").iterdir()) == ["answers", "embeddings"]
    shutil.rmtree(".work/answers")
    with closing(make_systems(params)) as systems:
        again = [system.encode(["why?"], "Tell:") for system in systems.build(params.evaluate.systems)]
    assert (np.array(again) == np.array(embedded)).all() and not Path(".work/answers").exists()


def test_teacher_and_hyde_embed_in_the_space_that_the_student_was_trained_in(
    inputs: Callable[..., SystemInputs],
) -> None:
    params = inputs(embeddings_dtype="float32")
    with closing(make_systems(params)) as systems:
        plain = {system.name: (system.identity, system.encode(["why?"], "Tell:")) for system in systems.build(BOTH)}
    width = plain["teacher"][1].shape[1]
    forward = np.eye(width, 3, dtype=np.float32) * 2
    transform = TargetTransform("whiten", True, np.ones(width, np.float32), forward, forward.T / 4)
    transform.save(Path("models/encoder"))
    with closing(make_systems(params)) as systems:  # and the cache of embeddings keeps the two apart
        for system in systems.build(BOTH):
            identity, vectors = plain[system.name]
            assert system.identity != identity
            assert transform.identity["sha256"] in json.dumps(system.identity)
            np.testing.assert_allclose(system.encode(["why?"], "Tell:"), transform(vectors), atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_teacher_embeds_as_the_targets_were_made(inputs: Callable[..., SystemInputs], normalize: bool) -> None:
    answers = [f"answer number {index}" for index in range(60)]
    write_queries(answers)
    write_responses(answers)
    params = inputs(embeddings_dtype="float32")
    embed = {"teacher": {"kind": "hash"}, "normalize": normalize, "dtype": "float32", "transform": {"kind": "whiten"}}
    write_params(backbone=params.backbone.model_dump(), embed=embed)
    done = CliRunner().invoke(embed_app, [])
    assert done.exit_code == 0, done.output
    Path("models/encoder").mkdir(parents=True)
    shutil.copy("data/targets/transform.safetensors", "models/encoder")
    table = open_artifact(Path("data/targets"), "targets").read()
    targets = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    with closing(make_systems(params)) as systems:
        [teacher] = systems.build(["teacher"])
        np.testing.assert_allclose(teacher.encode(answers, ""), [targets[row_id(a)] for a in answers], atol=1e-5)


def test_a_transform_of_another_teacher(inputs: Callable[..., SystemInputs]) -> None:
    TargetTransform("center", False, *[np.ones(3, np.float32)] * 3).save(Path("models/encoder"))
    with closing(make_systems(inputs())) as systems, pytest.raises(TeacherError, match=r"was fitted on 3: run embed"):
        next(systems.build(["teacher"]))


@pytest.mark.parametrize(
    ("system", "teacher", "key"),
    [
        ("letters", {"kind": "hash"}, r"evaluate\.models\.letters\.name: "),
        ("teacher", {"kind": "sentence-transformers", "name": "./missing"}, r"embed\.teacher\.name: "),
    ],
)
def test_a_missing_model_is_named_by_its_params_key(
    inputs: Callable[..., SystemInputs], system: str, teacher: dict[str, str], key: str
) -> None:
    embed = TeacherSection(teacher=TeacherParams(**teacher))
    params = inputs(models={"letters": {"name": "./missing"}}).model_copy(update={"embed": embed})
    with closing(make_systems(params)) as systems, pytest.raises(TeacherError, match=f"^{key}.*does not exist"):
        next(systems.build([system]))


def test_evaluate_answers_changes_how_long_answers_are(inputs: Callable[..., SystemInputs]) -> None:
    usual, short = make_answers(inputs()), make_answers(inputs(answers={"max_new_tokens": 4}))
    assert usual.identity["generate"]["max_new_tokens"] == 32
    assert short.identity["generate"]["max_new_tokens"] == 4
    assert len(short(["a question"])[0]) < len(usual(["a question"])[0])


@pytest.mark.parametrize(
    ("engine", "device", "wish", "kept"),
    [
        ("echo", "cpu", None, True),
        ("vllm", "cuda", None, False),
        ("openai", "cuda", None, True),
        ("vllm", "cuda", True, True),
        ("echo", "cpu", False, False),
    ],
)
def test_the_engine_stays_unless_it_shares_a_gpu_or_params_say_so(
    inputs: Callable[..., SystemInputs],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    device: str,
    wish: bool | None,
    kept: bool,
) -> None:
    monkeypatch.setattr(module, "best_device", lambda: device)
    assert make_answers(inputs(engine, answers={"keep_engine": wish})).keeps_engine is kept


@pytest.mark.parametrize(
    ("engine", "device", "wish", "options", "given"),
    [
        ("vllm", "cuda", True, {}, {"gpu_memory_utilization": 0.4}),
        ("vllm", "cuda", True, {"gpu_memory_utilization": 0.3}, {"gpu_memory_utilization": 0.3}),
        ("vllm", "cuda", None, {}, {}),
        ("vllm", "cpu", True, {}, {}),
        ("transformers", "cuda", True, {}, {}),
    ],
)
def test_a_kept_engine_leaves_the_teacher_its_share_of_a_gpu(
    inputs: Callable[..., SystemInputs],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    device: str,
    wish: bool | None,
    options: dict[str, float],
    given: dict[str, float],
) -> None:
    monkeypatch.setattr(module, "best_device", lambda: device)
    monkeypatch.setattr(module.Answers, "of", lambda backbone, generate, work, *, keeps_engine: generate)
    asked = inputs(engine, answers={"keep_engine": wish, "engine_memory": 0.4})
    asked = asked.model_copy(update={"generate": asked.generate.model_copy(update={"options": options})})
    assert make_answers(asked).options == given


def test_a_manifest_leaves_out_what_changes_no_score(inputs: Callable[..., SystemInputs]) -> None:
    plain = manifest_params(inputs(), suite="s")
    assert (
        manifest_params(inputs(cache_embeddings=False, answers={"keep_engine": True, "engine_memory": 0.1}), suite="s")
        == plain
    )
    assert manifest_params(inputs(embeddings_dtype="float32"), suite="s") != plain
    assert manifest_params(inputs(seeds=[1]), suite="s") != plain


def test_own_instructions_are_a_path_or_none(inputs: Callable[..., SystemInputs]) -> None:
    assert own_instructions(inputs()) is None
    assert own_instructions(inputs(instructions="mine.yaml")) == Path("mine.yaml")
