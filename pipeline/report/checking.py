"""The audit of the workspace as the report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from pipeline.audit import audit
from pipeline.audit.findings import Finding, Verified


@dataclass(frozen=True)
class Checked:
    """The outcome of an audit, and how long it took.

    `locked` is how many outs of dvc.lock were compared, None without a dvc.lock.
    """

    findings: Sequence[Finding]
    verified: Sequence[Verified]
    not_made: Sequence[str]
    locked: int | None
    seconds: float

    @property
    def verdict(self) -> str:
        """One sentence."""
        if count := len(self.findings):
            return f"{count} finding{'s' if count > 1 else ''}: what is listed here does not hold"
        if not self.verified:
            return "nothing to verify yet"
        read = sum(item.bytes for item in self.verified)
        compared = "there is no dvc.lock" if self.locked is None else f"{self.locked} outs agree with dvc.lock"
        return f"no findings in {len(self.verified)} artifacts ({read:,} bytes read), {compared}"


def check(root: Path, being_written: Sequence[str]) -> Checked:
    """Audit the workspace; `being_written` are files that dvc.lock cannot know yet."""
    started = monotonic()
    found = audit(root, being_written=being_written)
    return Checked(found.findings, found.verified, found.not_made, found.locked, monotonic() - started)
