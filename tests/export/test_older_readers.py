"""Older sentence-transformers and transformers, in environments of their own, read what the present code writes."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.folder.st_files import REQUIREMENTS
from pipeline.export.merged.export import export_merged
from tests.conftest import SMALL_LM
from tests.export.encoder_folders import write_folder

TEXTS = ["a", "What is the capital of France?", "ein längerer Text, 東京 ✓", "def f():\n    pass", "again and " * 60]
LOWEST = REQUIREMENTS["sentence-transformers"]["specifier"].removeprefix(">=")
# Version 4, and what it cannot share with version 5; datasets by way of the hub's client.
TRANSFORMERS_4 = ("transformers==4.56.2", "huggingface-hub<1", "tokenizers<0.23", "datasets==4.5.0")
# Largest difference allowed, relative to the longest embedding.
TOLERANCE = 1e-5
READER = """
import json, sys
from sentence_transformers import SentenceTransformer

texts, found = json.load(sys.stdin), {}
for folder in sys.argv[1:]:
    try:
        model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
        found[folder] = model.encode(texts, batch_size=2, show_progress_bar=False).tolist()
    except ImportError as error:
        found[folder] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds encoder folders `several` and `one` on a backbone that version 5 wrote, and `merged-*` of each."""
    if not SMALL_LM.is_dir():
        pytest.skip("run `make models` first")
    folder = tmp_path_factory.mktemp("written")
    write_folder(
        folder / "several", SMALL_LM, template="chat", compression_tokens=10, thought_tokens=0, share=0.3, width=24
    )
    write_folder(folder / "one", SMALL_LM, compression_tokens=1, thought_tokens=0, width=24)
    for name in ("several", "one"):
        export_merged(folder / name, folder / f"merged-{name}", prompts={})
    yield folder
    shutil.rmtree(folder)  # a checkpoint is half a gigabyte


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment with these packages, by pip as it is configured, before those of this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    command = [*pip, "install", "--quiet", "--no-compile", "--no-deps", "--retries", "1", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot get {', '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
    inside = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    # Only now: pip must not take this environment's packages for the other's.
    Path(inside, "this.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize(
    ("packages", "refusal"),
    [
        ((f"sentence-transformers=={LOWEST}.0",), None),
        ((f"sentence-transformers=={LOWEST}.0", *TRANSFORMERS_4), "transformers 5 or later, 4.56.2 is installed"),
        (("sentence-transformers==5.1.2", *TRANSFORMERS_4), f"transformers {LOWEST} or later, 5.1.2 is installed"),
    ],
    ids=["lowest", "lowest-transformers-4", "5.1-transformers-4"],
)
def test_an_older_reader_embeds_as_we_do_or_refuses(
    written: Path, tmp_path: Path, packages: tuple[str, ...], refusal: str | None
) -> None:
    """The merged checkpoint is read by all; the encoder folder by those that it declares, with one line for others."""
    python = environment(tmp_path / "environment", packages)
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    folders = ["several", "one", "merged-several", "merged-one"]
    done = subprocess.run(
        [python, "-c", READER, *folders], cwd=written, input=json.dumps(TEXTS), env=settings, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("several", "one"):
        expected = read_encoder(written / name).encode(TEXTS)
        limit = TOLERANCE * np.linalg.norm(expected, axis=1).max()
        np.testing.assert_allclose(found[f"merged-{name}"], expected, rtol=0, atol=limit)
        if refusal is None:
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=limit)
        else:
            assert refusal in found[name] and "\n" not in found[name]
