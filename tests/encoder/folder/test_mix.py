"""Another response share for a trained encoder: the same folder that training with it writes, and what it embeds."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.core.artifacts import open_artifact
from pipeline.core.errors import TrainingError
from pipeline.core.target_transform import TargetTransform
from pipeline.encoder.embedded_by import made_by
from pipeline.encoder.folder.read import read_encoder
from pipeline.lens import decode
from tests.encoder.test_inference import write
from tests.export.encoder_folders import write_folder
from tests.toy_workspace import write_manifest

TEXTS = ["a", "a longer text", "What is it?"]


def mix(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["mix", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def folder(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    return write_folder(Path("encoder"), tiny_backbone("qwen3"))


def test_a_mixed_folder_is_the_one_that_training_with_the_share_writes(
    folder: Path, tiny_backbone: Callable[..., Path]
) -> None:
    trained = write_folder(Path("trained"), tiny_backbone("qwen3"), share=0.3)
    assert "37 dimensions" in mix("encoder", "--response-share", ".3", "--output", "mixed")
    manifests = [open_artifact(path, "encoder").manifest for path in (trained, Path("mixed"))]
    assert manifests[0] == manifests[1]
    mix("mixed", "--response-share", "0.8")
    note = mix("mixed", "--response-share", "1")
    assert "train.response_share" in note
    assert open_artifact(Path("mixed"), "encoder").manifest == open_artifact(folder, "encoder").manifest


def test_inner_products_weigh_prediction_and_reading(folder: Path) -> None:
    mix("encoder", "--response-share", "0.3", "--output", "mixed")
    plain, mixed = read_encoder(folder), read_encoder(Path("mixed"))
    predicted, found = plain.encode(TEXTS), mixed.encode(TEXTS)
    assert found.shape == (3, mixed.width) == (3, 5 + 32)
    reading = mixed.head._reading
    hidden = plain.hidden_states(TEXTS).mean(axis=1)
    read = (hidden - reading.mean.numpy()) * reading.scale.numpy()
    lengths = reading.lengths.numpy()
    expected = 0.3**2 * predicted @ predicted.T * (lengths[1] / lengths[0]) ** 2 + 0.7**2 * read @ read.T
    np.testing.assert_allclose(found @ found.T, expected, rtol=1e-4, atol=1e-5)


def test_the_teachers_space_and_decoding_are_those_of_the_prediction(folder: Path) -> None:
    mix("encoder", "--response-share", "0.3", "--output", "mixed")
    plain, mixed = read_encoder(folder), read_encoder(Path("mixed"))
    assert mixed.width_of("teacher") == 5
    np.testing.assert_allclose(mixed.encode(TEXTS, space="teacher"), plain.encode(TEXTS), rtol=1e-5, atol=1e-6)
    assert decode(mixed, TEXTS, max_new_tokens=4) == decode(plain, TEXTS, max_new_tokens=4)
    assert made_by(mixed, "") != made_by(plain, "")


OWN: dict[str, Any] = {"kind": "backbone", "pooling": "mean"}
STANDARDIZED = TargetTransform("standardize", False, *[np.ones(32, np.float32)] * 3)


def test_reading_and_prediction_are_added_where_the_teacher_is_a_reading_of_the_backbone(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    own: dict[str, Any] = {"width": 32, "teacher": OWN, "transform": STANDARDIZED}
    write_folder(Path("encoder"), tiny_backbone("qwen3"), **own)
    trained = write_folder(Path("trained"), tiny_backbone("qwen3"), share=0.3, form="added", **own)
    mix("encoder", "--response-share", "0.3", "--output", "beside")
    assert "32 dimensions" in mix("beside", "--response-share", "0.3", "--response-form", "added", "--output", "mixed")
    assert open_artifact(trained, "encoder").manifest == open_artifact(Path("mixed"), "encoder").manifest
    beside, added = (read_encoder(Path(name)) for name in ("beside", "mixed"))
    parts = beside.encode(TEXTS)
    np.testing.assert_allclose(added.encode(TEXTS), parts[:, :32] + parts[:, 32:], rtol=1e-4, atol=1e-5)
    assert made_by(added, "") != made_by(beside, "")
    with pytest.raises(TrainingError, match="--response-share 1"):
        added.encode(TEXTS, space="teacher")


def test_a_prediction_in_another_space_cannot_be_added(folder: Path) -> None:
    done = CliRunner().invoke(app, ["mix", "encoder", "--response-share", "0.3", "--response-form", "added"])
    assert done.exit_code == 1
    assert "--response-form" in done.output and "embed.queries: true" in done.output
    assert "embed.teacher.kind: backbone" in done.output


def test_a_reading_with_a_map_is_added_in_the_space_of_any_teacher(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    write_folder(Path("encoder"), tiny_backbone("qwen3"), mapped=True)
    trained = write_folder(Path("trained"), tiny_backbone("qwen3"), mapped=True, share=0.3, form="added")
    arguments = ["--response-share", "0.3", "--response-form", "added"]
    assert "embeddings of 5 dimensions" in mix("encoder", *arguments, "--output", "mixed")
    assert open_artifact(trained, "encoder").manifest == open_artifact(Path("mixed"), "encoder").manifest
    plain, mixed = read_encoder(Path("encoder")), read_encoder(Path("mixed"))
    reading = mixed.head._reading
    own = (plain.hidden_states(TEXTS).mean(axis=1) - reading.mean.numpy()) * reading.scale.numpy()
    own = own @ reading.weight.numpy().T + reading.bias.numpy()
    lengths = reading.lengths.numpy()
    expected = 0.3 * lengths[2] / lengths[0] * plain.encode(TEXTS) + 0.7 * own
    np.testing.assert_allclose(mixed.encode(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert mixed.at_start().encode(TEXTS).shape == (3, 5)
    weights = load_file("mixed/reading.safetensors")
    save_file({**weights, "weight": weights["weight"][1:]}, "mixed/reading.safetensors")
    with pytest.raises(TrainingError, match=r"weight has shape \[4, 32\]"):
        read_encoder(Path("mixed"))
    note = mix("encoder", *arguments)
    assert "train.response_share to 0.3 and train.response_form to added" in note


def test_a_reading_beside_is_not_decorrelated(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write_folder(Path("encoder"), tiny_backbone("qwen3"), mapped=True, share=0.3, form="added")
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["params"]["train"]["decorrelate_reading"] = True
    write_manifest(manifest, content)
    mix("encoder", "--response-share", "0.3", "--response-form", "beside", "--output", "mixed")
    train = open_artifact(Path("mixed"), "encoder").manifest.params["train"]
    assert (train["response_form"], train["decorrelate_reading"]) == ("beside", False)


def test_an_encoder_is_not_written_into_itself(folder: Path) -> None:
    done = CliRunner().invoke(app, ["mix", "encoder", "--response-share", ".3", "--output", "encoder/mixed"])
    assert done.exit_code == 1 and "encoder/mixed" in done.output
    assert open_artifact(folder, "encoder")


def test_decode_looks_among_predicted_responses_alone(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write_folder(Path("encoder"), tiny_backbone("qwen3"), template="chat", mapped=True, share=0.3, form="added")
    Path("texts.txt").write_text("a\nb and c\n")
    call = partial(CliRunner().invoke, app)
    assert call(["encode", "--model", "encoder", "--input", "texts.txt", "--output", "known.parquet"]).exit_code == 0
    asked = ["decode", "--model", "encoder", "--input", "texts.txt", "--output", "o.parquet"]
    done = call([*asked, "--corpus", "known.parquet"])
    assert done.exit_code == 1 and "holds readings added to predicted responses" in done.output


def test_the_start_stands_at_the_share_of_the_student(folder: Path) -> None:
    mix("encoder", "--response-share", "0.3", "--output", "mixed")
    start, mixed_start = (read_encoder(path).at_start() for path in (folder, Path("mixed")))
    assert (start.width, mixed_start.width) == (5, 37)
    prediction = mixed_start.encode(TEXTS, space="teacher")
    np.testing.assert_allclose(prediction, start.encode(TEXTS), rtol=1e-5, atol=1e-6)
    assert np.abs(prediction - read_encoder(folder).encode(TEXTS)).max() > 1e-3
    np.testing.assert_array_equal(start.encode(TEXTS), read_encoder(folder).untrained(2).encode(TEXTS))


def test_the_reading_of_an_untrained_student_is_its_mean_hidden_state(folder: Path) -> None:
    encoder = read_encoder(folder)
    found = encoder.untrained_reading(7)
    expected = encoder.untrained(7).hidden_states(TEXTS, instruction="Say:").mean(axis=1)
    np.testing.assert_allclose(found.encode(TEXTS, instruction="Say:"), expected, atol=1e-5)


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_a_share_outside_of_its_range_is_refused(folder: Path, share: str) -> None:
    done = CliRunner().invoke(app, ["mix", "encoder", "--response-share", share])
    assert done.exit_code == 1
    assert "--response-share" in done.output
    assert "above 0 and at most 1" in done.output


def test_an_encoder_without_a_reading_is_refused(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(Path("encoder"), tiny_backbone("qwen3"), None)
    done = CliRunner().invoke(app, ["mix", "encoder", "--response-share", "0.5"])
    assert done.exit_code == 1
    assert "has no reading.safetensors" in done.output
