"""The short fault campaign: a sample of every attack, on every kind of storage and the quick stages."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks a process with many imports")
def test_the_short_campaign_breaks_no_promise() -> None:
    command = [sys.executable, "bench/faults.py", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    broken = ("lost_rows", "rows_computed_twice", "flips_unnoticed", "truncations_unnoticed", "tracebacks")
    assert {key: found[key] for key in broken} == dict.fromkeys(broken, 0)
    assert found["kills"] > 20 and found["power_cuts"] > 8 and found["full_disks"] > 8
    assert found["flips"] >= 40 and found["races"] >= 2
