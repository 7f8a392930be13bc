"""What an audit found, and what it verified."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pipeline.core.artifacts import Artifact
from pipeline.core.paths import STAGE_ARTIFACTS

# Names of the artifacts, by which findings refer to them.
QUERIES, RESPONSES, TEACHER, TARGETS, ENCODER = (path.as_posix() for path in STAGE_ARTIFACTS.values())

SHOWN_PER_CHECK = 20
STALE = "is stale"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which artifact, at which row id or file, and what."""

    artifact: str
    where: str
    what: str

    def line(self) -> str:
        """The finding as one line."""
        return " ".join(f"{self.artifact} {self.where}".split()) + ": " + " ".join(self.what.split())

    @property
    def stale(self) -> bool:
        """Whether the artifact is whole, but made from inputs that were made anew since."""
        return self.what.startswith(STALE)

    @property
    def of_source(self) -> bool:
        """Whether it is stale since a source has changed, which `where` names."""
        return self.stale and bool(self.where)


class Findings:
    """Collects findings in the order of the checks."""

    def __init__(self) -> None:
        self.items: list[Finding] = []
        self.unverifiable: list[Finding] = []

    def add(self, artifact: str, where: str, what: str) -> None:
        """Add one finding."""
        self.items.append(Finding(artifact, where, what))

    def cannot_verify(self, artifact: str, where: str, what: str) -> None:
        """Add what this workspace has no means to check: no finding, and no confirmation."""
        self.unverifiable.append(Finding(artifact, where, what))

    def add_rows(self, artifact: str, ids: Iterable[str], what: str) -> None:
        """Add a finding for each row; beyond the first few their number only."""
        rows = list(ids)
        for row in rows[:SHOWN_PER_CHECK]:
            self.add(artifact, row, what)
        if len(rows) > SHOWN_PER_CHECK:
            self.add(artifact, f"{len(rows) - SHOWN_PER_CHECK} more rows", what)

    def artifacts(self) -> set[str]:
        """Names of the artifacts with a finding."""
        return {finding.artifact for finding in self.items}


@dataclass(frozen=True)
class Verified:
    """An artifact without a finding."""

    artifact: str
    rows: int
    files: int
    bytes: int
    note: str


@dataclass(frozen=True)
class AuditReport:
    """The outcome of an audit.

    Attributes:
        unverifiable: what cannot be checked here, since a model or a source is elsewhere.
        not_made: artifacts that no stage has made yet.
        locked: outs of dvc.lock that were compared; None without a dvc.lock.
    """

    findings: list[Finding]
    unverifiable: list[Finding]
    verified: list[Verified]
    not_made: list[str]
    locked: int | None

    @classmethod
    def of(cls, findings: Findings, verified: Mapping[str, Artifact], missing: list[str], locked: int | None) -> Self:
        """The report on artifacts by name."""
        not_made = [name for name in missing if name not in findings.artifacts()]
        summed = [_verified(name, artifact) for name, artifact in verified.items()]
        return cls(findings.items, findings.unverifiable, summed, not_made, locked)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _verified(name: str, artifact: Artifact) -> Verified:
    files = [artifact.path / file for file in artifact.manifest.files]
    counts = artifact.manifest.counts.get("all", artifact.manifest.counts)
    note = ", ".join(f"{key} {value}" for key, value in counts.items() if isinstance(value, int) and value)
    return Verified(name, artifact.manifest.rows, len(files), sum(file.stat().st_size for file in files), note)
