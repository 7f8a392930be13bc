"""The train stage on a tiny backbone: a whole run, a killed run, and inputs that do not belong together."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.backbone.loading import identify
from pipeline.core import schemas as contracts
from pipeline.core.artifacts import create, file_sha256, open_artifact
from pipeline.core.target_transform import TRANSFORM_FILE, TargetTransform
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.inference import Encoder
from tests.conftest import ROOT

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

TRAIN: dict[str, Any] = {
    "compression_tokens": 2, "thought_tokens": 1, "template": "chat", "max_query_tokens": 64,
    "max_response_tokens": 32, "align_weight": 1.0, "recon_weight": 1.0, "align_reduction": "sum",
    "warm_start": {"enabled": True, "ridge": "auto"}, "learning_rate": 0.01, "weight_decay": 0.0,
    "warmup_steps": 2, "epochs": 3, "batch_size": 8, "micro_batch_size": 4, "max_grad_norm": 1.0,
    "checkpoint_every": 1, "seed": 0,
}  # fmt: skip


def write_inputs(backbone: Path, rows: int = 24, width: int = 6) -> None:
    """The three artifacts that train reads, in the current workspace."""
    ids = [f"{index:04x}" for index in range(rows)]
    queries = pa.table({"id": ids, "text": [f"query {i}" for i in ids], "source": ["t"] * rows}, contracts.QUERIES)
    with create(Path("data/queries"), kind="queries", params={}) as out:
        out.write_table("train.parquet", queries.slice(0, rows - 4))
        out.write_table("heldout.parquet", queries.slice(rows - 4))
    responses = [
        {"id": i, "response": f"answer {i}", "finish_reason": "stop", "prompt_tokens": 9, "response_tokens": 9}
        for i in ids
    ]
    models = {"backbone": identify(str(backbone), None)}
    with create(Path("data/responses"), kind="responses", params={}, models=models) as out:
        out.write_parts([pa.Table.from_pylist(responses, contracts.RESPONSES)], contracts.RESPONSES)
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    schema = contracts.targets_schema(width, "float32")
    table = pa.Table.from_pylist(
        [{"id": i, "embedding": vector.tolist()} for i, vector in zip(ids, vectors, strict=True)], schema
    )
    with create(Path("data/targets"), kind="targets", params={}, models={"teacher": {"name": "t"}}) as out:
        out.write_parts([table], schema)


def write_params(backbone: Path, **train: Any) -> None:
    """params.yaml (JSON is YAML) of the current workspace."""
    content = {"backbone": {"name": str(backbone), "dtype": "float32"}, "train": {**TRAIN, **train}}
    Path("params.yaml").write_text(json.dumps(content))


def start_stage(**options: Any) -> "subprocess.Popen[str]":
    """The real stage as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.train"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options
    )


def finish_stage() -> str:
    """Run the stage to its end; its stderr."""
    process = start_stage()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def backbone(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    """A workspace with inputs and params; returns its backbone."""
    folder = tiny_backbone("qwen3")
    write_inputs(folder)
    write_params(folder)
    return folder


def test_trains_an_encoder_that_loads(backbone: Path) -> None:
    finish_stage()
    artifact = open_artifact(Path("models/encoder"), "encoder")
    assert set(artifact.manifest.inputs) == {"data/queries", "data/responses", "data/targets"}
    assert artifact.manifest.models["backbone"] == identify(str(backbone), None)
    encoder = read_encoder(Path("models/encoder"))
    embeddings = encoder.encode(["query 0001", "query 0002", "a much longer query than these"])
    assert embeddings.shape == (3, 6)
    np.testing.assert_allclose(encoder.encode(["query 0002"]), embeddings[1:2], atol=1e-4)
    facts = json.loads(Path("results/train.json").read_text())
    assert facts["steps"] == 9
    assert {"seconds_per_step", "tokens_per_second", "model_tflops"} <= facts["training"].keys()
    assert facts["heldout_last"]["step"] == 9
    assert Path("results/train/loss.csv").read_text().count("\n") == 10
    assert [line.split(",")[0] for line in Path("results/train/heldout.csv").read_text().split()] == ["step", "0", "9"]


def test_an_encoder_behind_a_transform_embeds_in_both_spaces(backbone: Path) -> None:
    forward = np.linspace(1, 2, 24, dtype=np.float32).reshape(4, 6) + np.eye(4, 6, dtype=np.float32)
    transform = TargetTransform("whiten", False, np.arange(4, dtype=np.float32), forward, np.linalg.pinv(forward))
    transform.save(Path("data/targets"))
    add_to_manifest(Path("data/targets"), TRANSFORM_FILE)
    write_params(backbone, epochs=1)
    finish_stage()
    open_artifact(Path("models/encoder"), "encoder")
    assert Path("models/encoder", TRANSFORM_FILE).read_bytes() == transform.to_bytes()
    encoder = read_encoder(Path("models/encoder"))
    assert encoder.config.transform == transform.identity
    assert "transform `whiten`" in Path("models/encoder/README.md").read_text()
    trained = encoder.encode(["query 0001"])
    np.testing.assert_array_equal(encoder.encode(["query 0001"], space="teacher"), transform.invert(trained))
    assert (encoder.width_of("trained"), encoder.width_of("teacher")) == (6, 4)


def add_to_manifest(folder: Path, name: str) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = file_sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_queries_that_are_too_long_lose_the_side_that_params_say(backbone: Path) -> None:
    write_params(backbone, max_query_tokens=8, too_long="keep_end")
    stderr = finish_stage()
    assert "queries are longer than train.max_query_tokens and lose their start" in stderr
    encoder = read_encoder(Path("models/encoder"))
    assert (encoder.config.keep, encoder.max_tokens) == ("end", 8)
    np.testing.assert_allclose(encoder.encode(["query 0001"]), encoder.encode([" 0001"]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shard_backbone", [False, True])
def test_two_processes_take_the_steps_of_one(backbone: Path, shard_backbone: bool) -> None:
    finish_stage()
    alone = np.loadtxt("results/train/loss.csv", delimiter=",", skiprows=1)
    write_params(backbone, processes=2, shard_backbone=shard_backbone)
    shutil.rmtree(".work")
    finish_stage()
    np.testing.assert_allclose(np.loadtxt("results/train/loss.csv", delimiter=",", skiprows=1), alone, rtol=1e-5)
    facts = json.loads(Path("results/train.json").read_text())
    assert (facts["steps"], facts["processes"]) == (9, 2)


@pytest.mark.slow
def test_processes_of_a_launcher_start_no_others(backbone: Path) -> None:
    write_params(backbone, processes=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launcher, "-m", "pipeline.train"], env=environment, check=True, timeout=300)
    assert json.loads(Path("results/train.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_an_adapted_encoder_loads(backbone: Path) -> None:
    write_params(backbone, lora={"rank": 2}, learning_rate=0.05)
    finish_stage()
    adapted = read_encoder(Path("models/encoder"))
    plain = Encoder(adapted.model, adapted.tokenizer, adapted.student, adapted.config, adapted.identity)
    texts = ["query 0001", "query 0002"]
    assert np.isfinite(adapted.encode(texts)).all()
    assert np.abs(adapted.encode(texts) - plain.encode(texts)).max() > 1e-3


@pytest.mark.slow
def test_kill_9_resumes_to_the_same_bytes(backbone: Path) -> None:
    finish_stage()
    expected, curve = contents(Path("models/encoder")), Path("results/train/loss.csv").read_text()
    write_params(backbone, seed=0)
    for path in Path(".work").rglob("checkpoint"):
        path.unlink()
    process = start_stage()
    checkpoint = _wait_for_checkpoint(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.is_file()
    stderr = finish_stage()
    assert "resuming after step" in stderr
    assert contents(Path("models/encoder")) == expected
    assert Path("results/train/loss.csv").read_text() == curve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_what_is_kept(backbone: Path, number: signal.Signals) -> None:
    write_params(backbone, epochs=4000)
    process = start_stage()
    _wait_for_checkpoint(process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished work is kept" in stderr
    assert "Traceback" not in stderr
    assert not Path("models/encoder").exists()


def _wait_for_checkpoint(process: "subprocess.Popen[str]") -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list(Path(".work").rglob("checkpoint"))
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint: {process.communicate()[1]}")


def fails_with(*messages: str) -> None:
    process = start_stage()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    for message in messages:
        assert message in stderr


def test_a_response_longer_than_the_limit(backbone: Path) -> None:
    write_params(backbone, max_response_tokens=4)
    fails_with("longer than train.max_response_tokens (4)", "train.long_responses: cut")


def test_a_usable_response_without_a_target(backbone: Path) -> None:
    artifact = open_artifact(Path("data/targets"), "targets")
    table = artifact.read()
    shutil.rmtree("data/targets")
    with create(Path("data/targets"), kind="targets", params={}, models={"teacher": {"name": "t"}}) as out:
        out.write_parts([table.slice(2)], table.schema)
    fails_with("2 queries have a usable response but no target: run embed again (ids 0000, 0001)")


def test_sharding_does_not_go_with_adapters(backbone: Path) -> None:
    write_params(backbone, shard_backbone=True, lora={"rank": 2})
    fails_with("shard_backbone: true does not go with lora")


def test_another_backbone_than_the_responses(backbone: Path, tiny_backbone: Callable[..., Path]) -> None:
    write_params(tiny_backbone("llama"))
    fails_with("run generate and embed again")


def test_backbone_without_chat_template(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = tiny_backbone("llama", chat=False)
    write_inputs(folder)
    write_params(folder)
    fails_with("no chat template", "train.template: raw")


def test_truncated_parquet(backbone: Path) -> None:
    part = Path("data/targets/part-00000.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    fails_with("error: data/targets/part-00000.parquet: sha256 is")


def test_an_encoder_takes_a_loaded_backbone_wherever_it_came_from(backbone: Path) -> None:
    from pipeline.backbone.loading import BackboneParams, load_backbone

    finish_stage()
    expected = read_encoder(Path("models/encoder")).encode(["query 0001"])
    loaded = load_backbone(BackboneParams(name=str(backbone), dtype="float32"))
    moved = Path("models/encoder/encoder_config.json")
    moved.write_text(moved.read_text().replace(str(backbone), "models/moved/away"))
    np.testing.assert_allclose(read_encoder(Path("models/encoder"), backbone=loaded).encode(["query 0001"]), expected)


def test_other_backbone_weights_are_refused_when_loading(backbone: Path, tiny_backbone: Callable[..., Path]) -> None:
    from pipeline.core.errors import TrainingError

    finish_stage()
    with pytest.raises(TrainingError, match="the encoder was trained on"):
        read_encoder(Path("models/encoder"), backbone=str(tiny_backbone("llama")))
