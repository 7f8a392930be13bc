"""The short fault campaign: a sample of every attack, on every kind of storage and the quick stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fault_campaign.disk import Disk, Fault, Tear
from bench.fault_campaign.inputs import FILES_OF_THE_README, commands_of
from bench.fault_campaign.processes import Journal, run
from bench.fault_campaign.snapshots import Snapshots, read_states
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks processes, and reads /proc")


@pytest.mark.slow
@linux
def test_the_short_campaign_breaks_no_promise() -> None:
    command = [sys.executable, "bench/faults.py", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    broken = ("lost_rows", "rows_computed_twice", "flips_unnoticed", "truncations_unnoticed", "tracebacks")
    assert {key: found[key] for key in (*broken, "unexplained")} == dict.fromkeys((*broken, "unexplained"), 0)
    assert found["kills"] > 20 and found["power_cuts"] > 8 and found["full_disks"] > 8
    assert found["flips"] > 30 and found["races"] >= 2 and found["bad_inputs"] >= 20


def write_twice(folder: Path) -> None:
    """A file that is synced, and one that is not; what changes elsewhere does not count."""
    import os

    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    for name, content in (("safe", b"1234"), ("loose", b"5678")):
        with open(folder / name, "wb", buffering=0) as file:  # noqa: PTH123 - the shim is in `open`
            file.write(content)
            if name == "safe":
                os.fsync(file.fileno())


@linux
def test_a_snapshot_is_what_a_kill_leaves(tmp_path: Path) -> None:
    (log := tmp_path / "log").touch()
    (watched := tmp_path / "watched").mkdir()
    (states := tmp_path / "states").mkdir()

    def watch() -> None:
        snapshots = Snapshots(watched, states, Journal(tmp_path / "journal"))
        Disk(watched, watch=snapshots.take).install()
        write_twice(watched)
        snapshots.finish()

    assert run(watch, watched, log).code == 0, log.read_text()
    taken = {(state.kind, state.first): contents(Path(state.folder)) for state in read_states(states)}
    left = {}
    for fault in (Fault.KILL, Fault.POWER):
        for at in range(1, 6):
            (folder := tmp_path / f"{fault}-{at}").mkdir()
            assert run(lambda: killed(folder, fault, at), folder, log).killed  # noqa: B023 - called at once
            left[fault, at] = contents(folder)
    # Open, write, fsync; open, write: the half of a write, and of that half where it was not synced.
    assert left[Fault.KILL, 2] == {"safe": b"12"} and left[Fault.POWER, 2] == {"safe": b"1"}
    assert left[Fault.POWER, 5] == {"safe": b"1234", "loose": b"5"}
    assert {json.dumps({k: v.decode() for k, v in state.items()}) for state in taken.values()} == {
        json.dumps({k: v.decode() for k, v in state.items()}) for state in left.values()
    }
    assert all(left[Fault(kind), at] == content for (kind, at), content in taken.items())


def killed(folder: Path, fault: Fault, at: int) -> None:
    Disk(folder, fault, at).install()
    write_twice(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)}


def test_half_of_a_write_stands_in_what_was_there() -> None:
    assert Tear(Path("x"), 2, b"ab").on(b"012345") == b"01ab45"
    assert Tear(Path("x"), 6, b"ab").on(b"012345") == b"012345ab"


def test_the_commands_of_the_readme_are_found_and_name_files() -> None:
    commands = commands_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {words[0] for words in commands} >= {"params", "encode", "decode", "search", "audit", "inspect", "push"}
    assert {word for words in commands for word in words} >= FILES_OF_THE_README
    assert commands_of('    python -m pipeline decode "a b" -k 5   # five\npython -m pipeline no') == [
        ["decode", "a b", "-k", "5"]
    ]
