"""Artifacts to the hub and back, with the real client and a hub on loopback; each command in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.api import load
from pipeline.core.errors import SourceError, TrainingError
from pipeline.encoder.folder.locate import encoder_folder
from pipeline.export.hub import push
from tests.conftest import ROOT
from tests.export.encoder_folders import write_folder
from tests.export.hub_server import TOKEN, Hub, serving
from tests.toy_workspace import make_workspace

HUB_BACKBONE = {"name": "org/backbone", "revision": "a" * 40}


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Callable[..., Path]) -> Path:
    return tiny_backbone("llama")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def python(hub: Hub, cwd: Path, *arguments: str, token: str | None = TOKEN) -> "subprocess.CompletedProcess[str]":
    """A new process that knows this hub and this token alone."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "hf")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def header(card: str) -> dict[str, object]:
    return YAML(typ="safe").load(card.split("---\n")[1])


@pytest.mark.slow
def test_an_encoder_goes_to_the_hub_and_embeds_from_there(hub: Hub, tmp_path: Path, backbone: Path) -> None:
    folder = write_folder(tmp_path / "encoder", backbone, recorded=HUB_BACKBONE)
    pushed = python(hub, tmp_path, "-m", "pipeline", "push", "encoder", "org/name", "--license", "mit", "--private")
    assert pushed.returncode == 0, pushed.stderr
    revision = hub.main["model org/name"]
    assert pushed.stdout.strip() == f"{hub.address}/org/name/commit/{revision}"
    files = hub.files("model org/name")
    assert files["student.safetensors"] == (folder / "student.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert header(card) | {"license": "mit", "base_model": "org/backbone"} == header(card)
    assert 'SentenceTransformer("org/name"' in card
    assert hub.private == {"model org/name": True} and hub.tokens == {TOKEN}
    assert not any(TOKEN.encode() in content for content in files.values())

    code = (
        "import sys; from pipeline import load\n"
        "vectors = load('org/name', revision=sys.argv[1], backbone=sys.argv[2]).encode(['one text'])\n"
        "import numpy; numpy.save('python.npy', vectors)"
    )
    loaded = python(hub, tmp_path, "-c", code, revision, str(backbone))
    assert loaded.returncode == 0, loaded.stderr
    (tmp_path / "texts.txt").write_text("one text\n")
    options = ["--input", "texts.txt", "--output", "cli.npy", "--backbone", str(backbone)]
    encoded = python(hub, tmp_path, "-m", "pipeline", "encode", "--model", "org/name", *options, token=None)
    assert encoded.returncode == 0, encoded.stderr
    for command in (["search", "--corpus", "texts.txt", "one"], ["decode", "one", "--max-new-tokens", "2"]):
        from_hub = [*command, "--model", "org/name", "--backbone", str(backbone)]
        done = python(hub, tmp_path, "-m", "pipeline", *from_hub, token=None)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    expected = load(folder, backbone=backbone).encode(["one text"])
    for name in ("python.npy", "cli.npy"):
        np.testing.assert_allclose(np.load(tmp_path / name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_responses_go_to_the_hub_as_a_data_set_with_a_card(hub: Hub, workspace: Path) -> None:
    make_workspace(workspace)
    pushed = python(hub, workspace, "-m", "pipeline", "push", "data/responses", "org/answers")
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files("dataset org/answers")
    assert {"README.md", "manifest.json", "part-00000.parquet"} <= files.keys()
    [config] = header(files["README.md"].decode())["configs"]
    assert config["data_files"] == [{"split": "train", "path": "part-*.parquet"}]
    assert "5 rows" in files["README.md"].decode() and "org/backbone" in files["README.md"].decode()

    for token, named in (("wrong", "401"), (None, "HF_TOKEN")):
        refused = python(hub, workspace, "-m", "pipeline", "push", "data/responses", "org/answers", token=token)
        assert refused.returncode == 1 and named in refused.stderr and refused.stderr.count("\n") == 1


def test_an_encoder_on_a_folder_of_this_machine_is_not_given_away(tmp_path: Path, backbone: Path) -> None:
    folder = write_folder(tmp_path / "encoder", backbone)
    with pytest.raises(SourceError, match=str(backbone)):
        push(folder, "org/name")


def test_an_evaluation_is_no_data_set(workspace: Path) -> None:
    make_workspace(workspace)
    with pytest.raises(SourceError, match="results/evaluate/demo is a evaluate"):
        push(Path("results/evaluate/demo"), "org/name")


def test_a_folder_that_is_not_made_yet_is_not_looked_for_on_the_hub(workspace: Path) -> None:
    (workspace / "models").mkdir()
    assert encoder_folder("models/encoder") == Path("models/encoder")
    with pytest.raises(TrainingError, match="revision"):
        encoder_folder("models/encoder", "main")


def test_queries_keep_their_splits(workspace: Path) -> None:
    from pipeline.core.artifacts import open_artifact
    from pipeline.export.hub import data_card

    make_workspace(workspace)
    card = data_card(open_artifact(Path("data/queries"), "queries"), "org/queries", "apache-2.0")
    [config] = header(card)["configs"]
    assert config["data_files"] == [
        {"split": "heldout", "path": "heldout.parquet"},
        {"split": "train", "path": "train.parquet"},
    ]
    assert header(card)["license"] == "apache-2.0"
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == {"seed": 0}
