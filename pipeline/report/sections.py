"""What the report says besides scores and cost: samples, the audit, provenance, systems and the teacher."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from time import monotonic
from typing import Any

from ruamel.yaml import YAML

from pipeline.audit import audit
from pipeline.audit.findings import Finding, Verified
from pipeline.core.artifacts import read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.paths import ROWS_TABLE, TARGETS_DIR, TEACHER_DIR
from pipeline.core.target_transform import TRANSFORM_FILE
from pipeline.embed.teachers.registry import TEACHERS, TRAINED
from pipeline.evaluate.comparison import Comparison, Row
from pipeline.evaluate.registry import BUILT_IN, split_seed, system_order


@dataclass(frozen=True)
class Sample:
    """What one held-out query's embedding encodes; None or empty where the artifact lacks a column.

    `faithfulness` and `to_embedding` are cosines of the decoded text to response and embedding, in the teacher's space.
    """

    query: str
    response: str
    decoded: str
    faithfulness: float | None
    to_embedding: float | None
    vocabulary: list[str]


def read_samples(folder: Path) -> list[Sample]:
    """The rows of the probe `interpret` in `folder`; raises ArtifactError if they are missing or damaged."""
    return [
        Sample(
            query=row.get("query") or "",
            response=row.get("response") or "",
            decoded=row.get("decoded") or "",
            faithfulness=row.get("cosine_response", row.get("faithfulness")),
            to_embedding=row.get("cosine_embedding"),
            vocabulary=_words(row.get("vocabulary") or []),
        )
        for row in read_manifest(folder).read(ROWS_TABLE).to_pylist()
    ]


def _words(per_token: Sequence[Sequence[Any]]) -> list[str]:
    """The words nearest to any token, each once, by rank."""
    entries = (entry for rank in zip_longest(*per_token, fillvalue="") for entry in rank)
    # Older artifacts hold words without probabilities.
    words = (str(entry.get("word", "") if isinstance(entry, dict) else entry).strip() for entry in entries)
    return list(dict.fromkeys(word for word in words if word))[:16]


@dataclass(frozen=True)
class AuditOutcome:
    """The findings of an audit, its seconds, and how many outs of dvc.lock it compared (None without a dvc.lock)."""

    findings: Sequence[Finding]
    unverifiable: Sequence[Finding]
    verified: Sequence[Verified]
    not_made: Sequence[str]
    locked: int | None
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [finding.line() for finding in self.findings]

    @property
    def verdict(self) -> str:
        if count := len(self.findings):
            return f"{count} finding{'s' if count > 1 else ''}: what is listed here does not hold"
        if not self.verified:
            return "nothing to verify yet"
        read = sum(item.bytes for item in self.verified)
        compared = "there is no dvc.lock" if self.locked is None else f"{self.locked} outs agree with dvc.lock"
        absent = f"; not verifiable here: {', '.join(item.line() for item in self.unverifiable)}"
        sound = f"no findings in {len(self.verified)} artifacts ({read:,} bytes read), {compared}"
        return sound + (absent if self.unverifiable else "")


def audit_workspace(root: Path, being_written: Sequence[Path]) -> AuditOutcome:
    """Audit the workspace without the files `being_written`, which dvc.lock cannot know yet."""
    started = monotonic()
    found = audit(root, being_written=being_written)
    seconds = monotonic() - started
    return AuditOutcome(found.findings, found.unverifiable, found.verified, found.not_made, found.locked, seconds)


@dataclass(frozen=True)
class Provenance:
    """What made an artifact: the digests of its manifest and its inputs, and its params and models as YAML."""

    artifact: str
    digest: str
    inputs: Mapping[str, str]
    params: str


def provenance(root: Path, artifacts: Iterable[str]) -> list[Provenance]:
    """Of each readable artifact."""
    found = []
    for name in artifacts:
        try:
            artifact = read_manifest(root / name)
        except ArtifactError:
            continue  # listed as missing
        manifest = artifact.manifest
        origin = {"params": manifest.params} | ({"models": manifest.models} if manifest.models else {})
        found.append(Provenance(name, artifact.digest, manifest.inputs, _to_yaml(origin)))
    return found


def _to_yaml(value: Any) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    sink = StringIO()
    yaml.dump(value, sink)
    return sink.getvalue()


@dataclass(frozen=True)
class SystemFacts:
    """A system, the model behind it, and what it reads besides the text."""

    name: str
    model: str
    prompting: str


def system_facts(known: Sequence[SystemFacts], comparison: Comparison, record: Mapping[str, Any]) -> list[SystemFacts]:
    """`known` and the systems of another record, in reading order; the first description of a system stays."""
    found = {facts.name: facts for facts in known}
    for name in comparison.systems:
        first = found.get(name, SystemFacts(name, "", ""))
        model, prompting = _model(record["systems"][name]), comparison.prompting.get(name, "")
        found[name] = SystemFacts(name, first.model or model, first.prompting or prompting)
    return [found[name] for name in sorted(found, key=system_order)]


def _model(described: Any) -> str:
    """A system's own model, else the names of its parts."""
    identity = described.get("identity") if isinstance(described, dict) else None
    if not isinstance(identity, dict):
        return ""
    if isinstance(identity.get("name"), str):
        return str(identity["name"])
    inner = (part["name"] for part in identity.values() if isinstance(part, dict) and isinstance(part.get("name"), str))
    return ", ".join(dict.fromkeys(inner))


@dataclass(frozen=True)
class Spread:
    """One metric of an untrained student, raw or standardised, over its seeds."""

    system: str
    metric: str
    seeds: int
    mean: float
    deviation: float


def untrained_spread(comparison: Comparison) -> list[Spread]:
    """Mean and standard deviation (n - 1) over the untrained students, if there are several.

    Of the table's means, or of every metric if it has no means.
    """
    rows = [row for row in comparison.rows if row.summary] or comparison.rows
    per_seed = [name for name, entry in BUILT_IN.items() if entry.per_seed]
    found = (_spread(name, row, comparison.systems) for name in per_seed for row in rows)
    return [spread for spread in found if spread is not None]


def _spread(base: str, row: Row, systems: Sequence[str]) -> Spread | None:
    cells = [cell for name, cell in zip(systems, row.cells, strict=True) if split_seed(name)[0] == base]
    scores = [cell.score for cell in cells if cell.score is not None]
    return Spread(base, row.metric, len(scores), fmean(scores), stdev(scores)) if len(scores) > 1 else None


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher and its quality: what its kind means for the numbers, and the kind of transform ("none").

    `scores` are of a teacher trained here, by task and system; `worse` is a sentence if an untrained
    reading of its backbone is better.
    """

    kind: str
    meaning: str
    transform: str
    scores: Mapping[str, Mapping[str, float]]
    worse: str | None


def teacher_facts(root: Path, trained: Mapping[str, Any] | None) -> TeacherFacts | None:
    """The teacher of the workspace's targets; None without targets. `trained` is the record of the stage teach."""
    try:
        manifest = read_manifest(root / TARGETS_DIR).manifest
    except ArtifactError:
        return None
    identity = manifest.models.get("teacher")
    if not isinstance(identity, dict):
        return None
    kind = _kind(identity)
    record = (trained or {}) if kind == TRAINED else {}
    asked = manifest.params.get("transform") or {"kind": "none"}
    # auto may have found that nothing is to be changed.
    transform = (
        asked if asked["kind"] != "auto" else {"kind": "standardize" if TRANSFORM_FILE in manifest.files else "none"}
    )
    meaning = (TEACHERS[kind].meaning if kind in TEACHERS else "") + _training_text(record)
    changed = f"{transform['kind']}{', decorrelated' * bool(transform.get('decorrelate'))}"
    changed += ", rotated" * bool(transform.get("rotate"))
    return TeacherFacts(kind, meaning, changed, _scores(record), record.get("worse_than_untrained"))


def trained_here(root: Path) -> bool:
    """Whether the stage teach was asked to train the workspace's teacher."""
    try:
        return bool(read_manifest(root / TEACHER_DIR).manifest.params.get("asked"))
    except ArtifactError:
        return False


def _training_text(record: Mapping[str, Any]) -> str:
    """The training text of a teacher that was trained here."""
    corpus = (record.get("corpus") or {}).get("kind")
    if corpus is None:
        return ""
    return "; its text is teach.sources" if corpus == "sources" else f"; its text is this run's own ({corpus})"


def _kind(identity: Mapping[str, Any]) -> str:
    adapters = [str(adapter.get("name", "")) for adapter in identity.get("adapters", ())]
    own = bool(adapters) and all(name.startswith(f"{TEACHER_DIR.as_posix()}/") for name in adapters)
    return TRAINED if own else str(identity.get("kind", ""))


def _scores(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for key, score in (record.get("metrics") or {}).items():
        system, _, task = key.partition("/")
        if not task.startswith("type/") and task != "mean/types":
            table.setdefault(task, {})[system] = score
    return table
