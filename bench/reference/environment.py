"""The reference implementation in an environment of its own, made once under `.bench/`.

The package comes as its source archive: the wheel lacks `scripts/train.py`, which holds the training loss. pip takes
its indexes from its own settings (`PIP_EXTRA_INDEX_URL` for a CPU build of torch).
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.common import ROOT

PACKAGE = "llm2vec-gen==0.1.3"
HOME = ROOT / ".bench"
ENVIRONMENT = HOME / "reference-env"
SOURCE = HOME / "reference-source"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def python() -> Path:
    """The reference's interpreter; makes its environment unless a whole one is there.

    Raises:
        SystemExit: a step failed; pip's own message is shown.
    """
    done = ENVIRONMENT / "complete"
    if not (done.is_file() and done.read_text() == _wanted()):
        _make()
        done.write_text(_wanted())
    return ENVIRONMENT / "bin" / "python"


def script() -> Path:
    """The reference's training script."""
    (found,) = SOURCE.glob("*/scripts/train.py")
    return found


def _wanted() -> str:
    return f"{PACKAGE}\n{REQUIREMENTS.read_text(encoding='utf-8')}"


def _make() -> None:
    print(f"making {ENVIRONMENT.relative_to(ROOT)} (once, some minutes)", file=sys.stderr, flush=True)
    for folder in (ENVIRONMENT, SOURCE):
        shutil.rmtree(folder, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    _call(sys.executable, "-m", "venv", ENVIRONMENT)
    pip = (ENVIRONMENT / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    _call(*pip, "install", "-r", REQUIREMENTS)
    _call(*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", SOURCE, PACKAGE)
    (archive,) = SOURCE.glob("*.tar.gz")
    _call(*pip, "install", "--no-deps", "--no-build-isolation", archive)
    with tarfile.open(archive) as file:
        file.extractall(SOURCE, filter="data")


def _call(*command: str | Path) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{process.stderr[-4000:]}")


def readable_backbone(folder: Path, to: Path) -> None:
    """Write `folder`'s model so that transformers 4 reads it: the weights by link, the config with `rope_theta`.

    transformers 5 writes the base of the rotation inside `rope_parameters` only, and version 4 takes its default of
    10,000 without a word.
    """
    to.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        sys.exit(f"{folder}: rope_type is {rope['rope_type']}, only 'default' is converted for the reference")
    config["rope_theta"] = rope["rope_theta"]
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for weights in folder.glob("*.safetensors*"):
        (to / weights.name).symlink_to(weights.resolve())
