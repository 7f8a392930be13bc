"""What older sentence-transformers and transformers make of the folders, each in a process of its own.

Only with LONG_TESTS=1: their packages come from the package index; torch and the rest are those of this environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.encoder.folder.read import read_encoder
from pipeline.export.merged.export import export_merged
from pipeline.tasks.instructions import load_instructions
from tests.export.encoder_folders import write_folder

TRANSFORMERS_4 = ("transformers==4.56.2", "huggingface_hub==0.35.3", "tokenizers==0.22.1", "datasets==4.0.0")
READERS = {
    "5.7": ("sentence-transformers==5.7.0",),
    "5.4": ("sentence-transformers==5.4.1",),
    "5.4 on transformers 4": ("sentence-transformers==5.4.1", *TRANSFORMERS_4),
    "5.1 on transformers 4": ("sentence-transformers==5.1.2", *TRANSFORMERS_4),
}
TEXTS = ["Why is the sky blue?", "a longer text " * 30, "ünïcode 東京"]
READ = """
import json, sys
from sentence_transformers import SentenceTransformer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = SentenceTransformer(folder, trust_remote_code=folder == "encoder", device="cpu")
print(json.dumps(model.encode(texts, prompt_name="query").tolist()))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="needs a package index: set LONG_TESTS=1"),
]


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs `READ` beside the packages of an older reader; what it prints, or the end of its error."""
    place = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    subprocess.run([*install, *READERS[request.param]], check=True, capture_output=True)

    def read(folder: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
        command = [sys.executable, "-c", READ, folder, json.dumps(TEXTS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).strip().splitlines()[-1]

    read.__name__ = request.param
    return read


REFUSED = {
    "5.4 on transformers 4": "this encoder needs transformers 5 or later, 4.56.2 is installed",
    "5.1 on transformers 4": "this encoder needs sentence-transformers 5.4 or later",
}


def test_the_encoder_folder_embeds_as_the_encoder_or_says_what_it_needs(
    workspace: Path, tiny_backbone: Callable[..., Path], reader: Callable[..., str]
) -> None:
    folder = write_folder(Path("encoder"), tiny_backbone("llama"), template="chat", share=0.3)
    found = reader("encoder")
    if reader.__name__ in REFUSED:
        assert REFUSED[reader.__name__] in found
        return
    expected = read_encoder(folder).encode(TEXTS, instruction=load_instructions().types["Retrieval"].query)
    np.testing.assert_allclose(json.loads(found), expected, atol=1e-4)


@pytest.mark.parametrize(("tokens", "template"), [(1, "raw"), (3, "chat")])
def test_the_merged_checkpoint_embeds_as_the_encoder(
    workspace: Path, tiny_backbone: Callable[..., Path], reader: Callable[..., str], tokens: int, template: str
) -> None:
    folder = write_folder(
        Path("encoder"),
        tiny_backbone("llama"),
        compression_tokens=tokens,
        template=template,
        share=0.3,  # type: ignore[arg-type]
    )
    export_merged(folder, Path("merged"), prompts={"query": "Say: "})
    expected = read_encoder(folder).encode(TEXTS, instruction="Say:")
    np.testing.assert_allclose(json.loads(reader("merged")), expected, atol=1e-4)
