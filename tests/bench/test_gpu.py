"""bench/gpu.py runs whole on a CPU with tiny models: a machine with a GPU must not meet a script that fails."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    assert found["trainer, resumed to 14"]["resumed"] is True
    assert found["trainer, resumed to 14"]["last"]["step"] == 14
    assert found["passes qwen3-4b"]["query pass"] == "FrozenPackedQueryPass"
