"""What a stop at each change of the disk would leave, copied while one run goes on: a run a change would take hours.

A process that is killed leaves the disk as it is at that moment, so a copy of it is as good as a kill. States that are
equal, as before and after an fsync, are kept once.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.fault_campaign.disk import Disk, Fault, Tear
from bench.fault_campaign.processes import Journal
from pipeline.core.files import bytes_sha256

_KINDS = (Fault.KILL, Fault.POWER)


@dataclass
class State:
    """A folder as it is left by a stop.

    Attributes:
        kind: how it is stopped the first time.
        first: the number of the change, from 1.
        stops: how many stops leave it.
        rows: how many rows of the journal were computed before the last of them.
    """

    folder: str
    kind: str
    first: int
    stops: int
    rows: int


class Snapshots:
    """Takes the states of one run in the folder `root`, into `folder`."""

    def __init__(self, root: Path, folder: Path, journal: Journal) -> None:
        self._root, self._folder, self._journal = root.resolve(), folder, journal
        self._states: dict[str, State] = {}

    def take(self, disk: Disk, tear: Tear | None) -> None:
        """Keep what a kill and a power cut would leave now; `tear` is what a write under way has written."""
        contents = {path: path.read_bytes() if path.is_file() else None for path in sorted(self._root.rglob("*"))}
        unsynced = {path for path in disk.unsynced() if path in contents}
        if tear is not None and tear.path in contents:
            contents[tear.path] = tear.on(contents[tear.path] or b"")
            unsynced.add(tear.path)
        rows = len(list(self._journal))
        for kind in _KINDS:
            if kind == Fault.POWER:
                contents |= {path: _half(contents[path] or b"") for path in unsynced}
            digest = bytes_sha256(b"".join(_entry(path, content) for path, content in contents.items()))
            if digest not in self._states:
                place = self._folder / str(len(self._states))
                _write(contents, self._root, place)
                self._states[digest] = State(str(place), kind, disk.changes, 0, rows)
            self._states[digest].stops += 1
            self._states[digest].rows = rows

    def finish(self) -> None:
        """Write the list of states, outside of the folder that is watched."""
        content = json.dumps([asdict(state) for state in self._states.values()])
        (self._folder / "states.json").write_text(content)


def read_states(folder: Path) -> Iterator[State]:
    """The states that `Snapshots` took; each folder goes when the next state is asked for."""
    for found in json.loads((folder / "states.json").read_text()):
        yield State(**found)
        shutil.rmtree(found["folder"])


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _entry(path: Path, content: bytes | None) -> bytes:
    return f"{path} {'-' if content is None else bytes_sha256(content)}\n".encode()


def _write(contents: dict[Path, bytes | None], root: Path, place: Path) -> None:
    place.mkdir()
    for path, content in contents.items():
        target = place / path.relative_to(root)
        (target if content is None else target.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            target.write_bytes(content)
