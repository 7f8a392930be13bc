"""The README's examples run."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.encoder.test_inference import write

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# What is not run here, by a line of it, with the reason.
NOT_RUN = {"from vllm import LLM": "vLLM starts for a minute; tests/export/test_merged.py does what it shows"}
# Processes import the script again, so it must be one.
SCRIPTS = 'if __name__ == "__main__":'


def blocks(*, script: bool) -> list[str]:
    return [code for code in BLOCKS if not any(line in code for line in NOT_RUN) and (SCRIPTS in code) == script]


def test_every_example_is_run_or_named() -> None:
    assert all(sum(line in code for code in BLOCKS) == 1 for line in NOT_RUN)
    assert len(blocks(script=False)) + len(blocks(script=True)) + len(NOT_RUN) == len(BLOCKS)
    assert (len(blocks(script=False)), len(blocks(script=True))) == (3, 1)


@pytest.fixture
def encoder(workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    # The code of the folder goes to a cache that remembers folders by name.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workspace / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    write(Path("models/encoder"), tiny_backbone("llama"), None, max_query_tokens=128)
    return workspace


@pytest.mark.parametrize("code", blocks(script=False), ids=lambda code: code.splitlines()[0])
def test_an_example_runs(encoder: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "README.md", "exec"), names)
    for name in {"scores", "vectors"} & names.keys():
        assert np.isfinite(np.asarray(names[name])).all()
    if "similarity" in code:
        assert len(names["scores"]) == 1
    if "encode_stream" in code:
        assert capsys.readouterr().out == "(500, 5)\n(500, 5)\n"


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks(script=True))
def test_a_script_runs(encoder: Path, code: str) -> None:
    Path("script.py").write_text(code + "        print(vectors.shape)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(100, 5)\n"), done.stderr
