"""From the sections of params.yaml to the compared systems."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import pipeline.evaluate.build as module
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.config import validate
from pipeline.core.errors import TeacherError
from pipeline.core.target_transform import TargetTransform
from pipeline.embed.__main__ import app as embed_app
from pipeline.evaluate.__main__ import main
from pipeline.evaluate.build import SystemInputs, make_answers, make_systems, manifest_params, own_instructions
from tests.conftest import tiny_model, tiny_tokenizer
from tests.evaluate.fakes import retrieval_folder
from tests.stage_runs import row_id, write_params, write_queries, write_responses

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
    params = inputs()
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
    params = inputs()
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


def test_a_manifest_leaves_out_what_changes_no_score(inputs: Callable[..., SystemInputs]) -> None:
    plain = manifest_params(inputs(), suite="s")
    assert manifest_params(inputs(cache_embeddings=False, answers={"keep_engine": True}), suite="s") == plain
    assert manifest_params(inputs(seeds=[1]), suite="s") != plain


def test_own_instructions_are_a_path_or_none(inputs: Callable[..., SystemInputs]) -> None:
    assert own_instructions(inputs()) is None
    assert own_instructions(inputs(instructions="mine.yaml")) == Path("mine.yaml")


def write_models(backbone: Path) -> None:
    """An encoder that no step has trained, and a sentence-transformers model of letters."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from pipeline.backbone.loading import identify
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.folder.write import write_encoder
    from pipeline.encoder.student import new_student

    config = EncoderConfig(
        backbone=identify(str(backbone), None), chat_template_kwargs={}, template="raw", max_query_tokens=96,
        compression_tokens=2, thought_tokens=0, hidden=32, width=16, teacher={},
    )  # fmt: skip
    student = new_student(tiny_model("llama"), 16, compression_tokens=2, thought_tokens=0, seed=9)
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        write_encoder(out, student, tiny_tokenizer(), config, rows=1, steps=1)
    torch.manual_seed(0)
    static = StaticEmbedding(tiny_tokenizer(), embedding_dim=8)
    SentenceTransformer(modules=[static], prompts={"query": "find: "}, device="cpu").save("models/letters")


def test_every_system_runs_the_same_suite(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    retrieval_folder(workspace / "tasks" / "find")
    backbone = tiny_backbone("llama")
    write_models(backbone)
    systems = ["student", "teacher", "untrained", "backbone-mean", "echo", "hyde", "letters"]
    content = {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "generate": {"engine": "transformers", "dtype": "float32", "max_new_tokens": 4, "max_prompt_tokens": 96},
        "embed": {"teacher": {"kind": "hash", "options": {"width": 16}}},
        "evaluate": {
            "systems": systems,
            "local_dir": "tasks",
            "dtype": "float32",
            "seeds": [0, 5],
            "models": {"letters": {"name": "models/letters"}},
        },
        "suites": {"small": {"local": ["find"]}},
    }
    Path("params.yaml").write_text(json.dumps(content))
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["small"])
    assert done.exit_code == 0, done.output
    record = json.loads(Path("results/evaluate/small.json").read_text())
    assert set(record["systems"]) == {*systems, "untrained-5"}
    prompting = {system: facts["prompting"] for system, facts in record["systems"].items()}
    assert prompting["student"] == prompting["untrained-5"] == "generative instruction"
    assert prompting["teacher"] == prompting["backbone-mean"] == "bare text"
    assert prompting["letters"] == "query prompt 'find: ', document prompt ''"
    assert {delta["system"] for delta in record["deltas"]} == {*record["systems"]} - {"student"}
    assert record["seeds"]["find"]["seeds"] == 2
    assert len({facts["revision"] for facts in record["systems"].values()}) == len(record["systems"])
