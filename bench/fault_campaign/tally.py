"""What a campaign counts."""

import sys
from dataclasses import dataclass, field

from bench.fault_campaign.processes import Ended

SHOWN = 40


@dataclass
class Tally:
    """The counts of a campaign; `notes` are the first cases that broke a promise.

    Attributes:
        kills: processes that died by SIGKILL in their work, at a chosen change of the disk or at a random moment.
        stops: changes of the disk, twice each, at which what a kill or a power cut leaves was copied from a run that
            went on, `states` of them different: the stage was run in each.
        power_cuts: of these kills, those after which unsynced bytes were lost too.
        full_disks: runs that met a full disk.
        lost_rows: rows of an undisturbed run that are missing or other after a fault and one more run; an artifact that
            is neither the old nor the new one while the fault lasts counts all its rows.
        rows_computed_twice: rows, texts and training steps that a run after a kill computed again, beyond the one
            commit interval that a kill may cost.
        flips: bytes of artifacts, stores and checkpoints that were changed, one at a time.
        truncations: files that were cut, one at a time.
        races: pairs of writers of one artifact, store or stage.
        bad_inputs: runs on inputs that are to end in one line.
        tracebacks: processes, of all attacks, that printed one.
        unexplained: processes that failed without a line that says why.
    """

    kills: int = 0
    stops: int = 0
    states: int = 0
    power_cuts: int = 0
    full_disks: int = 0
    lost_rows: int = 0
    rows_computed_twice: int = 0
    flips: int = 0
    flips_unnoticed: int = 0
    truncations: int = 0
    truncations_unnoticed: int = 0
    races: int = 0
    bad_inputs: int = 0
    tracebacks: int = 0
    unexplained: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Keep and print a broken promise."""
        if len(self.notes) < SHOWN:
            self.notes.append(what)
            print(what, file=sys.stderr, flush=True)

    def ended(self, where: str, ended: Ended, *codes: int) -> None:
        """Count a traceback; another exit code than `codes` is noted, and counts as a lost row."""
        if ended.traceback:
            self.tracebacks += 1
            self.note(f"{where}: {ended.stderr[-1500:]}")
        if ended.code not in codes:
            self.lost_rows += 1
            self.note(f"{where}: exit code {ended.code}, expected {codes}: {ended.stderr[-500:]}")

    def explained(self, where: str, ended: Ended, *words: str) -> None:
        """Count a failure that printed none of the words."""
        if not any(word in ended.stderr for word in words):
            self.unexplained += 1
            self.note(f"{where}: does not say what is wrong: {ended.stderr[-300:]}")

    def lost(self, where: str, rows: int) -> None:
        self.lost_rows += rows
        if rows:
            self.note(f"{where}: {rows} rows lost")

    def twice(self, where: str, rows: int) -> None:
        self.rows_computed_twice += max(0, rows)
        if rows > 0:
            self.note(f"{where}: {rows} rows computed twice beyond one interval")

    @property
    def broken(self) -> int:
        """How many promises were broken."""
        return (
            self.lost_rows
            + self.rows_computed_twice
            + self.flips_unnoticed
            + self.truncations_unnoticed
            + self.tracebacks
            + self.unexplained
        )
