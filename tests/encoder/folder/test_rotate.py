"""Rotated embeddings: the same cosines, most of them in the first dimensions, by every reader of the folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.core.artifacts import open_artifact
from pipeline.core.target_transform import TargetTransform
from pipeline.core.vectors import unit_rows
from pipeline.encoder.embedded_by import made_by
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.folder.rotate import fit_rotation
from pipeline.encoder.head import EmbeddingHead, Reading
from pipeline.encoder.student import Student
from pipeline.lens import decode
from tests.export.encoder_folders import write_folder

TEXTS = [f"{word} {number}" for word in ("bread", "cloud", "eagle") for number in range(20)]


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(params=[1.0, 0.3])
def folder(workspace: Path, tiny_backbone: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """An encoder of the paper's form, and one that keeps its reading beside its prediction."""
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    return write_folder(Path("encoder"), tiny_backbone("qwen3"), share=request.param)


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = unit_rows(vectors.astype(np.float64))
    return unit @ unit.T


def test_cosines_stay_and_the_first_dimensions_are_their_best_approximation(folder: Path) -> None:
    plain = read_encoder(folder)
    said = command("rotate", "encoder", "--texts", "texts.txt", "--output", "rotated")
    rotated = read_encoder(Path("rotated"))
    # A reading beside the prediction is 5 + 32 wide, and both are maps of 32 hidden dimensions.
    assert rotated.width == (5 if plain.width == 5 else 33)
    assert f"embeddings of {rotated.width} dimensions, {plain.width} before, rotated on 60 texts" in said
    before, after = plain.encode(TEXTS), rotated.encode(TEXTS)
    np.testing.assert_allclose(cosines(after), cosines(before), atol=1e-5)
    other = ["something else", "<|end|>", "東京"]
    np.testing.assert_allclose(cosines(rotated.encode(other)), cosines(plain.encode(other)), atol=1e-5)
    values = np.linalg.svd(unit_rows(before.astype(np.float64)), compute_uv=False)
    unit = unit_rows(after.astype(np.float64))[:, :3]
    error = np.linalg.norm(cosines(before) - unit @ unit.T)
    assert error == pytest.approx(np.sqrt((values[3:] ** 4).sum()), rel=1e-2, abs=1e-5)
    assert f"{rotated.width} hold 100.0%" in said


def test_what_an_embedding_holds_is_what_it_held(folder: Path) -> None:
    plain = read_encoder(folder)
    command("rotate", "encoder", "--texts", "texts.txt", "--output", "rotated")
    rotated = read_encoder(Path("rotated"))
    assert rotated.width_of("teacher") == 5
    found = rotated.encode(TEXTS[:4], space="teacher")
    np.testing.assert_allclose(found, plain.encode(TEXTS[:4], space="teacher"), rtol=1e-3, atol=1e-4)
    assert decode(rotated, TEXTS[:2], max_new_tokens=4) == decode(plain, TEXTS[:2], max_new_tokens=4)
    assert made_by(rotated, "") != made_by(plain, "")
    np.testing.assert_allclose(rotated.at_start().encode(TEXTS[:3]), plain.at_start().encode(TEXTS[:3]), atol=1e-6)


def test_sentence_transformers_and_the_merged_checkpoint_embed_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(Path("modules").resolve()))
    command("rotate", "encoder", "--texts", "texts.txt", "--output", "rotated")
    expected = read_encoder(Path("rotated")).encode(TEXTS[:5])
    model = SentenceTransformer("rotated", trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS[:5]), expected, atol=1e-4)
    model.save("again")
    again = SentenceTransformer("again", trust_remote_code=True, device="cpu", truncate_dim=2)
    np.testing.assert_allclose(again.encode(TEXTS[:5]), expected[:, :2], atol=1e-4)
    assert again.get_embedding_dimension() == 2
    command("export-merged", "rotated", "merged")
    merged = SentenceTransformer("merged", device="cpu", truncate_dim=2)
    np.testing.assert_allclose(merged.encode(TEXTS[:5]), expected[:, :2], atol=1e-4)
    card = Path("rotated/README.md").read_text()
    assert f"Embeddings have {expected.shape[1]}\ndimensions" in card
    assert "the first dimensions hold" in card and "not trained to be truncated" not in card


def test_decode_looks_among_predicted_responses_alone(folder: Path) -> None:
    command("rotate", "encoder", "--texts", "texts.txt")
    command("encode", "--model", "encoder", "--input", "texts.txt", "--output", "rotated.parquet")
    asked = ["decode", "--model", "encoder", "--input", "texts.txt", "--output", "o.parquet", "--corpus"]
    done = CliRunner().invoke(app, [*asked, "rotated.parquet"])
    assert done.exit_code == 1
    assert "holds rotated embeddings" in done.output


def test_the_first_dimensions_alone_may_stay(folder: Path) -> None:
    command("rotate", "encoder", "--texts", "texts.txt", "--output", "whole")
    command("rotate", "encoder", "--texts", "texts.txt", "--output", "short", "--dimensions", "2")
    whole, short = (read_encoder(Path(name)).encode(TEXTS[:5]) for name in ("whole", "short"))
    np.testing.assert_allclose(short, whole[:, :2], atol=1e-5)


def test_texts_that_are_too_long_are_counted_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.encoder.folder.rotate.CHUNK_ROWS", 2)
    Path("long.txt").write_text("".join(f"{text * 40}\n" for text in ("one", "two", "three")))
    command("rotate", "encoder", "--texts", "long.txt", "--output", "rotated")
    assert [line for line in caplog.messages if "are longer than" in line] == [
        "3 of 3 texts are longer than 64 tokens, prompt and template included (max_query_tokens), and lose their end "
        "(keep: start)"
    ]


def test_a_new_share_leaves_the_rotation_behind(folder: Path) -> None:
    before = open_artifact(folder, "encoder").manifest
    share = before.params["train"]["response_share"]
    assert "dvc repro" in command("rotate", "encoder", "--texts", "texts.txt")
    assert open_artifact(folder, "encoder").manifest.params["rotate"]["texts"] == 60
    twice = read_encoder(folder).encode(TEXTS)
    command("rotate", "encoder", "--texts", "texts.txt")
    np.testing.assert_allclose(np.abs(read_encoder(folder).encode(TEXTS)), np.abs(twice), atol=1e-4)
    assert "rotate again" in command("mix", "encoder", "--response-share", str(share))
    assert open_artifact(folder, "encoder").manifest == before


def test_the_way_back_to_the_teachers_space_is_kept(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    transform = TargetTransform("center", False, *[np.ones(5, np.float32)] * 3)
    plain = read_encoder(write_folder(Path("encoder"), tiny_backbone("llama"), transform=transform))
    command("rotate", "encoder", "--texts", "texts.txt", "--output", "rotated")
    found = read_encoder(Path("rotated")).encode(TEXTS[:3], space="teacher")
    np.testing.assert_allclose(found, plain.encode(TEXTS[:3]) + 1, atol=1e-4)


def test_directions_that_no_text_has_come_last_and_stay() -> None:
    head = EmbeddingHead(Student(hidden=6, width=4, compression_tokens=2))
    hidden = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeddings = head(hidden).numpy()
        found = fit_rotation(head, [embeddings[:1], embeddings[1:2]])
        rotated = EmbeddingHead(head.student, rotation=found.rotation)(hidden).numpy()
    assert found.shares[2:] == pytest.approx([0, 0], abs=1e-9)
    np.testing.assert_allclose(rotated[:2, 2:], 0, atol=1e-6)
    np.testing.assert_allclose(cosines(rotated), cosines(embeddings), atol=1e-6)


def test_a_reading_and_its_prediction_fit_into_one_dimension_more_than_the_hidden_state() -> None:
    student = Student(hidden=3, width=2, compression_tokens=1)
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    head = EmbeddingHead(student, 0.5, Reading.fit(student, features))
    with torch.no_grad():
        embeddings = head(features[:, None]).numpy()
    found = fit_rotation(head, [embeddings])
    assert (head.width, len(found.shares)) == (5, 4)
    with torch.no_grad():
        rotated = EmbeddingHead(student, 0.5, Reading.fit(student, features), found.rotation)(features[:, None])
    np.testing.assert_allclose(rotated @ rotated.T, embeddings @ embeddings.T, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dimensions", "34"], "--dimensions: 34: embeddings of this encoder span"),
        (["--output", "texts.txt"], "texts.txt exists already"),
        (["--texts", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_write_nothing(folder: Path, arguments: list[str], message: str) -> None:
    before = open_artifact(folder, "encoder").digest
    done = CliRunner().invoke(app, ["rotate", "encoder", "--texts", "texts.txt", *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert open_artifact(folder, "encoder").digest == before
