"""The train stage on a tiny backbone: a whole run, a killed run, and inputs that do not belong together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from pipeline.backbone.loading import BackboneParams, identify, load_backbone
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.errors import TrainingError
from pipeline.core.files import file_sha256
from pipeline.core.paths import (
    ENCODER_DIR,
    HELDOUT_CURVE,
    HELDOUT_TABLE,
    LOSS_CURVE,
    QUERIES_DIR,
    RESPONSES_DIR,
    TARGETS_DIR,
    TRAIN_TABLE,
)
from pipeline.core.schemas import QUERY_EMBEDDING, targets_schema
from pipeline.core.target_transform import TRANSFORM_FILE, TargetTransform, TransformParams
from pipeline.core.vectors import matrix
from pipeline.embed.transform_fit import fit_transform
from pipeline.encoder.folder.mix import mix
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.inference import Encoder
from pipeline.optim.late import HostCopy
from pipeline.train.__main__ import main
from pipeline.train.data import TrainingRows
from pipeline.train.states import HalvedPasses
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import STRENGTHS
from tests.toy_workspace import write_manifest
from tests.train.conftest import ENVIRONMENT, run_stage, write_inputs, write_params, write_targets


def run() -> None:
    """The stage in this process."""
    main(Path("params.yaml"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_trains_an_encoder_that_loads(trained: Path, tiny_backbone: Callable[..., Path]) -> None:
    artifact = open_artifact(ENCODER_DIR, "encoder")
    assert set(artifact.manifest.inputs) == {"data/queries", "data/responses", "data/targets"}
    assert artifact.manifest.models["backbone"] == identify(str(tiny_backbone("qwen3")), None)
    encoder = read_encoder(ENCODER_DIR)
    embeddings = encoder.encode(["query 0001", "query 0002", "a much longer query than these"])
    assert embeddings.shape == (3, 6)
    np.testing.assert_allclose(encoder.encode(["query 0002"]), embeddings[1:2], atol=1e-4)
    facts = json.loads(Path("results/train.json").read_text())
    assert facts["steps"] == 9
    assert {"seconds_per_step", "tokens_per_second", "model_tflops"} <= facts["training"].keys()
    assert facts["heldout_last"]["step"] == 9
    assert LOSS_CURVE.read_text().count("\n") == 10
    assert [line.split(",")[0] for line in HELDOUT_CURVE.read_text().split()] == ["step", "0", "9"]


def test_live_losses_leave_the_encoder_as_it_is(backbone: Path, finished: Path) -> None:
    write_params(backbone, track="dvclive")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the finished run
    run()
    torch.set_num_threads(threads)
    assert contents(ENCODER_DIR) == contents(finished / ENCODER_DIR)
    plots = Path("results/live/train/plots/metrics")
    losses = [line.split("\t")[-2:] for line in (plots / "loss.tsv").read_text().splitlines()[1:]]
    curve = [line.split(",")[:2] for line in LOSS_CURVE.read_text().splitlines()[1:]]
    assert [(int(step), float(loss)) for step, loss in losses] == [
        (int(step), pytest.approx(float(loss), rel=1e-5)) for step, loss in curve
    ]
    heldout = (plots / "heldout/mrr.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[-2] for line in heldout] == ["0", "9"]


def test_an_encoder_behind_a_transform_embeds_in_both_spaces(backbone: Path) -> None:
    forward = np.linspace(1, 2, 24, dtype=np.float32).reshape(4, 6) + np.eye(4, 6, dtype=np.float32)
    transform = TargetTransform("whiten", False, np.arange(4, dtype=np.float32), forward, np.linalg.pinv(forward))
    transform.save(TARGETS_DIR)
    add_to_manifest(TARGETS_DIR, TRANSFORM_FILE)
    write_params(backbone, epochs=1)
    run()
    open_artifact(ENCODER_DIR, "encoder")
    assert (ENCODER_DIR / TRANSFORM_FILE).read_bytes() == transform.to_bytes()
    encoder = read_encoder(ENCODER_DIR)
    assert encoder.config.transform == transform.identity
    assert "transform `whiten`" in (ENCODER_DIR / "README.md").read_text()
    trained = encoder.encode(["query 0001"])
    np.testing.assert_array_equal(encoder.encode(["query 0001"], space="teacher"), transform.invert(trained))
    assert (encoder.width_of("trained"), encoder.width_of("teacher")) == (6, 4)


def test_a_refined_start_is_another_alignment_projection(backbone: Path) -> None:
    found = []
    for refine in (None, {"steps": 5, "batch_size": 16}):
        write_params(backbone, learning_rate=1e-12, token_learning_rate=1e-12, refine=refine)
        run()
        student = read_encoder(ENCODER_DIR).student
        found.append([layer.weight.detach() for layer in (student.reconstruction, student.alignment)])
    (reconstruction, alignment), (same, refined) = found
    torch.testing.assert_close(same, reconstruction)
    assert (refined - alignment).norm() > 0.01 * alignment.norm()


def test_a_refinement_without_a_closed_form_is_refused(backbone: Path, fails: Callable[..., None]) -> None:
    write_params(backbone, refine={}, warm_start={"enabled": False})
    fails("refine", "warm_start.enabled")


def test_an_alignment_fitted_again_takes_no_step(
    trained: Path, finished: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be switched on behind a finished run."""
    backbone, before = tiny_backbone("qwen3"), load_file(ENCODER_DIR / "student.safetensors")
    write_params(backbone, refit_alignment=True)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", MagicMock(side_effect=AssertionError))
        run()
    after = load_file(ENCODER_DIR / "student.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"alignment.weight", "alignment.bias"}
    assert LOSS_CURVE.read_bytes() == (finished / LOSS_CURVE).read_bytes()
    assert HELDOUT_CURVE.read_bytes() == (finished / HELDOUT_CURVE).read_bytes()
    facts = json.loads(Path("results/train.json").read_text())
    assert (facts["steps"], facts["heldout_refitted"]["step"]) == (9, 9)
    assert facts["heldout_refitted"]["cosine"] != facts["heldout_last"]["cosine"]
    assert facts["refit_ridge"] in STRENGTHS
    queries = open_artifact(QUERIES_DIR, "queries").read("train.parquet")["text"].to_pylist()
    lengths = np.linalg.norm(read_encoder(ENCODER_DIR).encode(queries), axis=1)
    np.testing.assert_allclose(load_file(ENCODER_DIR / "reading.safetensors")["lengths"][0], lengths.mean(), rtol=1e-4)


def write_query_targets(backbone: Path, **train: Any) -> np.ndarray:
    """Targets of six dimensions with those of the queries, `[24, 6]`, and params for a student that is added to."""
    table = open_artifact(TARGETS_DIR, "targets").read()
    of_queries = np.random.default_rng(1).normal(2.0, 1.0, (table.num_rows, 6)).astype(np.float32)
    rows = [row | {QUERY_EMBEDDING: vector.tolist()} for row, vector in zip(table.to_pylist(), of_queries, strict=True)]
    write_targets(pa.Table.from_pylist(rows, targets_schema(6, "float32", queries=True)), queries=True)
    write_params(backbone, epochs=1, response_share=0.3, response_form="added", **train)
    return of_queries


def test_a_reading_is_added_in_the_space_of_any_teacher_that_embedded_the_queries(backbone: Path) -> None:
    """The folder embeds by ridge regressions that are solved here anew."""
    of_queries = write_query_targets(backbone, seed=3)
    run()
    open_artifact(ENCODER_DIR, "encoder")
    encoder = read_encoder(ENCODER_DIR)
    texts = [f"query {row:04x}" for row in range(20)]  # the training queries
    states = encoder.hidden_states(texts).mean(axis=1).astype(np.float64)
    mean, deviation = states.mean(0), states.std(0)
    read = (states - mean) / deviation
    targets = of_queries[:20].astype(np.float64)
    answers = [
        read.T @ np.linalg.solve(read @ read.T + ridge * np.eye(20), targets - targets.mean(0)) for ridge in STRENGTHS
    ]
    reading = encoder.head._reading
    errors = [np.abs(reading.weight.numpy().T - weight).max() for weight in answers]
    assert min(errors) < 1e-4
    mapped = read @ answers[int(np.argmin(errors))] + targets.mean(0)
    mix(ENCODER_DIR, 1.0, Path("alone"))
    alone = read_encoder(Path("alone")).encode(texts)
    lengths = [np.linalg.norm(each, axis=1).mean() for each in (alone, mapped)]
    expected = 0.3 * lengths[1] / lengths[0] * alone + 0.7 * mapped
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=2e-3)
    assert encoder.width == encoder.at_start().width == 6
    assert encoder.at_start().head._reading.weight is not None


def test_a_reading_is_decorrelated_as_the_targets_are_that_it_is_added_to(backbone: Path) -> None:
    params = TransformParams(kind="standardize", decorrelate=0.5, shrinkage=0.3)
    table, draw = open_artifact(TARGETS_DIR, "targets").read(), np.random.default_rng(2)
    answers = draw.normal(size=(table.num_rows, 32)) @ draw.normal(size=(32, 32))
    transform = fit_transform(params, [answers], unit_length=False).transform
    rows = [
        row | {"embedding": vector.tolist()} for row, vector in zip(table.to_pylist(), transform(answers), strict=True)
    ]
    teacher, made = {"kind": "backbone", "pooling": "mean"}, params.model_dump()
    targets = pa.Table.from_pylist(rows, targets_schema(32, "float32"))
    write_targets(targets, teacher=teacher, fitted=transform, transform=made)
    write_params(backbone, epochs=1, response_share=0.3, response_form="added", decorrelate_reading=True)
    run()

    encoder, texts = read_encoder(ENCODER_DIR), [f"query {row:04x}" for row in range(20)]
    own = half_decorrelated(encoder, texts)
    mix(ENCODER_DIR, 1.0, Path("alone"))
    alone = read_encoder(Path("alone")).encode(texts)
    lengths = [np.linalg.norm(each, axis=1).mean() for each in (alone, own)]
    summed = 0.3 * lengths[1] / lengths[0] * alone + 0.7 * own
    np.testing.assert_allclose(encoder.encode(texts), summed, atol=2e-3)
    assert encoder.at_start().head._reading.weight is not None
    mix(ENCODER_DIR, 0.3, Path("beside"), "beside")
    np.testing.assert_allclose(read_encoder(Path("beside")).encode(texts)[:, 32:], 0.7 * own, atol=2e-3)


def half_decorrelated(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Their readings, of which the trainer has read all, by `{decorrelate: 0.5, shrinkage: 0.3}`."""
    states = encoder.hidden_states(texts).mean(axis=1).astype(np.float64)
    read = (states - states.mean(0)) / states.std(0)
    variances, directions = np.linalg.eigh(0.7 * read.T @ read / len(texts) + 0.3 * np.eye(32))
    own = read @ (directions * variances**-0.25) @ directions.T
    return np.asarray(own * np.sqrt(32 / own.var(0).sum()))


def test_a_reading_beside_is_decorrelated_whoever_the_teacher_is(backbone: Path) -> None:
    write_params(backbone, epochs=1, response_share=0.3, decorrelate_reading=True)
    run()
    encoder, texts = read_encoder(ENCODER_DIR), [f"query {row:04x}" for row in range(20)]
    own, found = half_decorrelated(encoder, texts), encoder.encode(texts)
    assert found.shape == (20, 6 + 32)
    np.testing.assert_allclose(found[:, 6:], 0.7 * own, atol=2e-3)
    lengths = [np.linalg.norm(part, axis=1).mean() for part in (found[:, :6], found[:, 6:])]
    assert lengths[0] / lengths[1] == pytest.approx(0.3 / 0.7, rel=1e-3)
    assert encoder.at_start().encode(texts).shape == (20, 6 + 32)
    with pytest.raises(TrainingError, match="it is added to"):
        mix(ENCODER_DIR, 0.3, Path("added"), "added")


def test_a_reading_is_not_decorrelated_for_targets_that_are_not(backbone: Path, fails: Callable[..., None]) -> None:
    write_query_targets(backbone, decorrelate_reading=True)
    fails("train.decorrelate_reading: true", "embed.queries")
    table = open_artifact(TARGETS_DIR, "targets").read().drop_columns([QUERY_EMBEDDING])
    vectors = matrix(table["embedding"])
    transform = fit_transform(TransformParams(kind="standardize"), [vectors], unit_length=False).transform
    write_targets(table, teacher={"kind": "backbone", "pooling": "mean"}, fitted=transform)
    write_params(backbone, response_form="added", decorrelate_reading=True)
    fails("train.decorrelate_reading: true", "embed.transform")


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_mapped_reading(backbone: Path) -> None:
    write_query_targets(backbone)
    run_stage()
    whole = contents(ENCODER_DIR)
    shutil.rmtree(ENCODER_DIR)
    shutil.rmtree(".work")
    run_stage(-signal.SIGKILL, PIPELINE_TEST_KILL="checkpoint.committed:2")
    run_stage()
    assert contents(ENCODER_DIR) == whole


def test_added_without_targets_of_the_queries_is_refused(backbone: Path, fails: Callable[..., None]) -> None:
    write_params(backbone, response_share=0.3, response_form="added")
    fails("train.response_form: added", "embed.queries: true")


def add_to_manifest(folder: Path, name: str) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = file_sha256(folder / name)
    write_manifest(folder / "manifest.json", content)


def test_a_response_share_is_made_of_the_trained_student(trained: Path, tiny_backbone: Callable[..., Path]) -> None:
    """The finished checkpoint is resumed, and `mix` makes the same folder of the former one."""
    before = (ENCODER_DIR / "student.safetensors").read_bytes()
    mix(ENCODER_DIR, 0.3, Path("mixed"))
    write_params(tiny_backbone("qwen3"), response_share=0.3)
    run()
    assert (ENCODER_DIR / "student.safetensors").read_bytes() == before
    assert read_encoder(ENCODER_DIR).encode(["query 0001"]).shape == (1, 6 + 32)
    trained_so, mixed = (open_artifact(path, "encoder").manifest for path in (ENCODER_DIR, Path("mixed")))
    assert trained_so == mixed
    [row] = [line for line in (ENCODER_DIR / "README.md").read_text().splitlines() if "response_share" in line]
    assert "0.3" in row


def test_other_variables_of_the_chat_template_train_anew(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are others then: a finished checkpoint is of other ones."""
    content = json.loads(Path("params.yaml").read_text())
    content["backbone"]["chat_template_kwargs"] = {"enable_thinking": False}
    Path("params.yaml").write_text(json.dumps(content))
    taken: list[int] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda trainer, at, batch: (taken.append(at), step(trainer, at, batch))[1])
    run()
    assert taken == list(range(9))


def test_another_ridge_reads_no_query_for_its_start(
    trained: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    read = HalvedPasses._read

    def counted(reader: HalvedPasses, rows: TrainingRows, some: Sequence[int]) -> HostCopy:
        passes.append(len(some))
        return read(reader, rows, some)

    monkeypatch.setattr(HalvedPasses, "_read", counted)
    write_params(tiny_backbone("qwen3"), warm_start={"enabled": True, "ridge": 3.0})
    run()
    assert sum(passes) == 20  # those of the trained student's reading
    before = load_file(ENCODER_DIR / "start.safetensors")
    shutil.rmtree(".work/hidden")
    shutil.rmtree(".work/train")
    run()
    assert sum(passes) == 20 + 2 * 20
    for name, value in load_file(ENCODER_DIR / "start.safetensors").items():
        # The kept states were computed in one thread, so last digits differ.
        np.testing.assert_allclose(value, before[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_reading_is_standardised_over_the_training_queries(trained: Path) -> None:
    encoder = read_encoder(ENCODER_DIR)
    queries = open_artifact(QUERIES_DIR, "queries").read("train.parquet")["text"].to_pylist()
    hidden = encoder.hidden_states(queries).mean(axis=1)
    reading = load_file(ENCODER_DIR / "reading.safetensors")
    np.testing.assert_allclose(reading["mean"], hidden.mean(0), atol=1e-4)
    np.testing.assert_allclose(1 / reading["scale"], hidden.std(0), rtol=1e-3)
    np.testing.assert_allclose(reading["lengths"][0], np.linalg.norm(encoder.encode(queries), axis=1).mean(), rtol=1e-4)


def test_the_start_is_the_student_before_its_first_step(backbone: Path) -> None:
    write_params(backbone, warm_start={"enabled": False}, seed=4)
    run()
    encoder, texts = read_encoder(ENCODER_DIR), ["query 0001", "query 0002"]
    start = encoder.at_start().encode(texts)
    np.testing.assert_array_equal(start, encoder.untrained(4).encode(texts))
    assert np.abs(start - encoder.encode(texts)).max() > 1e-3


@pytest.mark.parametrize("pool", ["text", "both"])
def test_what_is_pooled_of_a_second_text_is_trained_on(backbone: Path, pool: str) -> None:
    start = {"enabled": True, "ridge": 1.0}
    write_params(
        backbone, template="echo", pool=pool, max_query_tokens=90, response_share=0.5, epochs=1, warm_start=start
    )
    run()
    encoder = read_encoder(ENCODER_DIR)
    assert (encoder.config.template, encoder.config.pool) == ("echo", pool)
    queries = open_artifact(QUERIES_DIR, "queries").read("train.parquet")["text"].to_pylist()
    features = encoder.states(queries)[:, 0]
    reading = load_file(ENCODER_DIR / "reading.safetensors")
    np.testing.assert_allclose(reading["mean"], features.mean(0), atol=1e-4)
    found = encoder.encode(queries)
    np.testing.assert_allclose(found[:, 6:], 0.5 * (features - features.mean(0)) * reading["scale"], atol=1e-3)
    # The closed form was fitted on the same, with more dimensions than rows.
    targets = matrix(open_artifact(TARGETS_DIR, "targets").read()["embedding"])[:20]
    predicted = encoder.at_start().encode(queries, space="teacher")
    assert np.square(predicted - targets).sum() < 0.3 * np.square(targets - targets.mean(0)).sum()


def test_an_instruction_is_neither_repeated_nor_cut_off(backbone: Path, fails: Callable[..., None]) -> None:
    sources = [{"kind": "local", "path": "a.txt"}, {"kind": "local", "path": "b.txt", "instruction": "Explain:"}]
    table = {name: open_artifact(QUERIES_DIR, "queries").read(name) for name in (TRAIN_TABLE, HELDOUT_TABLE)}
    with create(QUERIES_DIR, kind="queries", params={"sources": sources}) as out:
        for name, rows in table.items():
            out.write_table(name, rows)
    write_params(backbone, template="echo")
    fails("train.template", "collect.sources.1.instruction")
    write_params(backbone, too_long="keep_end")
    fails("train.too_long: keep_end", "collect.sources.1.instruction")
    write_params(backbone, epochs=1)
    run()


def test_what_is_pooled_must_stand_twice(backbone: Path, fails: Callable[..., None]) -> None:
    write_params(backbone, template="chat", pool="both")
    fails("pool", "template echo")


def test_queries_that_are_too_long_lose_the_side_that_params_say(
    backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_params(backbone, max_query_tokens=8, too_long="keep_end", epochs=1)
    run()
    assert "queries are longer than max_query_tokens and lose their start" in caplog.text
    encoder = read_encoder(ENCODER_DIR)
    assert (encoder.config.keep, encoder.max_tokens) == ("end", 8)
    np.testing.assert_allclose(encoder.encode(["query 0001"]), encoder.encode([" 0001"]), atol=1e-6)


def test_an_adapted_encoder_loads(backbone: Path) -> None:
    write_params(backbone, lora={"rank": 2}, learning_rate=0.05)
    run()
    adapted = read_encoder(ENCODER_DIR)
    plain = Encoder(adapted.model, adapted.tokenizer, adapted.student, adapted.config, adapted.identity)
    texts = ["query 0001", "query 0002"]
    assert np.isfinite(adapted.encode(texts)).all()
    assert np.abs(adapted.encode(texts) - plain.encode(texts)).max() > 1e-3


def test_an_encoder_takes_a_loaded_backbone_wherever_it_came_from(
    trained: Path, tiny_backbone: Callable[..., Path]
) -> None:
    name = str(tiny_backbone("qwen3"))
    expected = read_encoder(ENCODER_DIR).encode(["query 0001"])
    loaded = load_backbone(BackboneParams(name=name, dtype="float32"))
    config = ENCODER_DIR / "encoder_config.json"
    config.write_text(config.read_text().replace(name, "models/moved/away"))
    np.testing.assert_allclose(read_encoder(ENCODER_DIR, backbone=loaded).encode(["query 0001"]), expected)


def test_other_backbone_weights_are_refused_when_loading(trained: Path, tiny_backbone: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match="the encoder was trained on"):
        read_encoder(ENCODER_DIR, backbone=str(tiny_backbone("llama")))


# --- several processes, signals, kills --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shard_backbone", [False, True])
def test_two_processes_take_the_steps_of_one(
    trained: Path, tiny_backbone: Callable[..., Path], shard_backbone: bool
) -> None:
    alone = [np.loadtxt(curve, delimiter=",", skiprows=1) for curve in (LOSS_CURVE, HELDOUT_CURVE)]
    write_params(tiny_backbone("qwen3"), processes=2, shard_backbone=shard_backbone)
    shutil.rmtree(".work")
    run_stage()
    for curve, expected in zip((LOSS_CURVE, HELDOUT_CURVE), alone, strict=True):
        np.testing.assert_allclose(np.loadtxt(curve, delimiter=",", skiprows=1), expected, rtol=1e-4)
    facts = json.loads(Path("results/train.json").read_text())
    assert (facts["steps"], facts["processes"]) == (9, 2)


@pytest.mark.slow
def test_two_processes_fit_the_alignment_of_one(backbone: Path) -> None:
    found = []
    for processes in (1, 2):
        write_params(backbone, processes=processes, refit_alignment=True)
        run_stage()
        facts = json.loads(Path("results/train.json").read_text())
        found.append((load_file(ENCODER_DIR / "student.safetensors"), facts["refit_ridge"], facts["heldout_refitted"]))
        shutil.rmtree(".work")
    (student, ridge, scores), (shared, same, shared_scores) = found
    assert same == ridge
    assert shared_scores == pytest.approx(scores, rel=1e-4)
    for name, value in student.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_launchers_of_two_machines_take_the_steps_of_one_process(
    trained: Path, tiny_backbone: Callable[..., Path]
) -> None:
    alone = np.loadtxt(LOSS_CURVE, delimiter=",", skiprows=1)
    write_params(tiny_backbone("qwen3"), processes=7)  # nothing to those of a launcher
    shutil.rmtree(".work")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free.getsockname()[1]}", "--rdzv_id", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    command = [*launcher, "--local_addr", "127.0.0.1", "-m", "pipeline.train"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    machines = [subprocess.Popen(command, env=environment) for _ in range(2)]
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    np.testing.assert_allclose(np.loadtxt(LOSS_CURVE, delimiter=",", skiprows=1), alone, rtol=1e-4)
    assert json.loads(Path("results/train.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("point", ["checkpoint.commit:2", "checkpoint.committed:6", "artifact.commit:1"])
def test_kill_9_resumes_to_the_same_bytes(backbone: Path, finished: Path, point: str) -> None:
    run_stage(-signal.SIGKILL, PIPELINE_TEST_KILL=point)
    assert not ENCODER_DIR.exists()
    assert "resuming after step" in run_stage()
    assert contents(ENCODER_DIR) == contents(finished / ENCODER_DIR)
    assert LOSS_CURVE.read_bytes() == (finished / LOSS_CURVE).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_checkpoint_and_says_so(
    backbone: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(backbone, checkpoint_every=100)
    take_step = Trainer._step

    def interrupted(trainer: Trainer, step: int, batch: list[int]) -> None:
        if step == 2:
            os.kill(os.getpid(), number)
        take_step(trainer, step, batch)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 130
    assert "finished work is kept" in capsys.readouterr().err
    assert not ENCODER_DIR.exists()
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("the third step was saved"))
    with pytest.raises(pytest.fail.Exception):
        run()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """`fails("train.lora", ...)`: the stage ends with one error that holds each of these."""

    def check(*parts: str) -> None:
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 1
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") or "\nerror: " in stderr
        assert not [part for part in parts if part not in stderr], stderr

    return check


def test_numbers_that_are_no_seed_or_no_strength_are_refused(backbone: Path, fails: Callable[..., None]) -> None:
    write_params(backbone, seed=-1)
    fails("train.seed", "-1")
    write_params(backbone, seed=2**64)
    fails("train.seed", "18446744073709551616")
    write_params(backbone, warm_start={"enabled": True, "ridge": -5.0})
    fails("train.warm_start.ridge", "-5.0")


def test_an_adapter_that_trains_nothing_is_refused_before_the_first_step(
    backbone: Path, fails: Callable[..., None]
) -> None:
    write_params(backbone, lora={"rank": 2, "targets": ["embed_tokens"]})
    fails("train.lora.targets: ['embed_tokens']")


def test_held_out_queries_without_an_answer_are_named(backbone: Path, fails: Callable[..., None]) -> None:
    responses, targets = open_artifact(RESPONSES_DIR, "responses"), open_artifact(TARGETS_DIR, "targets").read()
    table = responses.read()
    answers = table["response"].to_pylist()[:20] + [""] * 4
    with create(RESPONSES_DIR, kind="responses", params={}, models=responses.manifest.models) as out:
        out.write_parts([table.set_column(1, table.schema.field(1), pa.array(answers))], table.schema)
    write_targets(targets.slice(0, 20))
    fails("none of 4 queries of heldout.parquet has a target", "collect.heldout_fraction")


def test_a_cuda_build_without_a_gpu_stops_unless_the_cpu_is_chosen(
    backbone: Path, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Any] = []

    def stop(*_: Any, accelerator: Any, **__: Any) -> None:
        devices.append(accelerator.device.type)
        raise TrainingError("stopped by the test")

    monkeypatch.setattr("pipeline.train.build.assemble", stop)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delenv("PIPELINE_DEVICE", raising=False)
    fails("CUDA 13.0", "PIPELINE_DEVICE=cpu")
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    with monkeypatch.context() as patch:
        made: Any = MagicMock(return_value=MagicMock(device=torch.device("cpu")))
        patch.setattr("accelerate.Accelerator", made)
        fails("stopped by the test")
    assert made.call_args.kwargs["cpu"] is True and devices == ["cpu"]


def test_a_response_longer_than_the_limit(backbone: Path, fails: Callable[..., None]) -> None:
    write_params(backbone, max_response_tokens=4)
    fails("train.max_response_tokens: ", "longer than 4", "long_responses: cut")


def test_a_usable_response_without_a_target(backbone: Path, fails: Callable[..., None]) -> None:
    write_targets(open_artifact(TARGETS_DIR, "targets").read().slice(2))
    fails("2 queries have a usable response but no target", "(ids 0000, 0001)")


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({"shard_backbone": True, "lora": {"rank": 2}}, ["shard_backbone", "lora"]),
        ({"shard_backbone": True, "micro_batch_size": "auto"}, ["shard_backbone", "micro_batch_size"]),
        ({"micro_batch_size": 0}, ["train.micro_batch_size"]),
        ({"lora": {"targets": ["nowhere"]}}, ["train.lora.targets", "nowhere"]),
        ({"token_start": {"kind": "words", "words": ""}}, ["train.token_start.words"]),
        ({"passes": {"attention": "varlen"}}, ["train.passes.attention", "varlen"]),
        ({"processes": 100}, ["train.processes", "100", "batch_size"]),
        ({"align_weight": 0, "recon_weight": 0}, ["train", "align_weight", "recon_weight", "both 0"]),
    ],
)
def test_params_that_cannot_be_trained_with(
    backbone: Path, fails: Callable[..., None], train: dict[str, object], parts: list[str]
) -> None:
    write_params(backbone, **train)
    fails(*parts)


def test_another_backbone_than_the_responses(
    backbone: Path, tiny_backbone: Callable[..., Path], fails: Callable[..., None]
) -> None:
    write_params(tiny_backbone("llama"))
    fails("run generate and embed again")


def test_a_backbone_that_lies_elsewhere_than_when_it_answered(backbone: Path) -> None:
    moved = Path(shutil.copytree(backbone, "models/elsewhere"))
    write_params(moved)
    run()
    assert open_artifact(ENCODER_DIR, "encoder").manifest.models["backbone"] == identify(str(moved), None)


def test_backbone_without_chat_template(
    workspace: Path, tiny_backbone: Callable[..., Path], fails: Callable[..., None]
) -> None:
    folder = tiny_backbone("llama", chat=False)
    write_inputs(folder)
    write_params(folder)
    fails("no chat template", "template raw")


def test_truncated_parquet(backbone: Path, fails: Callable[..., None]) -> None:
    part = TARGETS_DIR / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    fails("error: data/targets/part-00000.parquet: sha256 is")
