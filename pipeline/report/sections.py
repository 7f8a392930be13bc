"""The rows of the probe `interpret`, as the report prints them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
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
from pipeline.embed.teachers.registry import TEACHERS, TRAINED
from pipeline.evaluate.comparison import Comparison, Row
from pipeline.evaluate.registry import system_order


@dataclass(frozen=True)
class Sample:
    """What one held-out query's embedding holds; None and empty are what the artifact does not say.

    Attributes:
        faithfulness: the decoded text's cosine to the response, in the teacher's space.
        to_embedding: the decoded text's cosine to the embedding itself, there too.
    """

    query: str
    response: str
    decoded: str
    faithfulness: float | None
    to_embedding: float | None
    vocabulary: list[str]


def read_samples(folder: Path) -> list[Sample]:
    """The rows of the artifact in `folder`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
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
    """The words nearest to any token, each once, in the order of their first appearance by rank."""
    deepest = max((len(words) for words in per_token), default=0)
    ranked = (_word(words[rank]) for rank in range(deepest) for words in per_token if rank < len(words))
    return list(dict.fromkeys(word for word in ranked if word))[:16]


def _word(entry: Any) -> str:
    """A word as it is, or with its probability beside it."""
    return str(entry.get("word", "") if isinstance(entry, dict) else entry).strip()


# The audit of the workspace as the report shows it.


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
    def lines(self) -> list[str]:
        """A line for each finding."""
        return [finding.line() for finding in self.findings]

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


def check(root: Path, being_written: Sequence[Path]) -> Checked:
    """Audit the workspace; `being_written` are files that dvc.lock cannot know yet."""
    started = monotonic()
    found = audit(root, being_written=being_written)
    return Checked(found.findings, found.verified, found.not_made, found.locked, monotonic() - started)


# The params that made each artifact, and the params file, as text.


@dataclass(frozen=True)
class Provenance:
    """What an artifact's manifest says of its making: its own digest, its inputs' and its params as YAML."""

    artifact: str
    digest: str
    inputs: Mapping[str, str]
    params: str


def provenance(root: Path, artifacts: Iterable[str]) -> list[Provenance]:
    """Of each artifact that is there and readable."""
    found = []
    for name in artifacts:
        try:
            artifact = read_manifest(root / name)
        except ArtifactError:
            continue  # said elsewhere
        manifest = artifact.manifest
        made_by = {"params": manifest.params} | ({"models": manifest.models} if manifest.models else {})
        found.append(Provenance(name, artifact.digest, manifest.inputs, to_yaml(made_by)))
    return found


def to_yaml(value: Any) -> str:
    """Block-style YAML in the order of the keys."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    sink = StringIO()
    yaml.dump(value, sink)
    return sink.getvalue()


# What each compared system is and reads, gathered from all records; and how far random starts lie apart.


@dataclass(frozen=True)
class SystemFacts:
    """A system, the model behind it, and what it reads besides the text."""

    name: str
    model: str
    prompting: str


def system_facts(known: Sequence[SystemFacts], comparison: Comparison, record: Mapping[str, Any]) -> list[SystemFacts]:
    """`known` and the systems of a further record, in reading order; what was said first stays."""
    found = {facts.name: facts for facts in known}
    for name in comparison.systems:
        before = found.get(name, SystemFacts(name, "", ""))
        model, prompting = _model(record["systems"][name]), comparison.prompting.get(name, "")
        found[name] = SystemFacts(name, before.model or model, before.prompting or prompting)
    return [found[name] for name in sorted(found, key=system_order)]


def _model(described: Any) -> str:
    """A system's own model, else the names of those that it is made of."""
    identity = described.get("identity") if isinstance(described, dict) else None
    if not isinstance(identity, dict):
        return ""
    if isinstance(identity.get("name"), str):
        return str(identity["name"])
    inner = (part["name"] for part in identity.values() if isinstance(part, dict) and isinstance(part.get("name"), str))
    return ", ".join(dict.fromkeys(inner))


@dataclass(frozen=True)
class Spread:
    """One metric of the untrained student over its random starts."""

    metric: str
    seeds: int
    mean: float
    deviation: float


def untrained_spread(comparison: Comparison) -> list[Spread]:
    """Mean and standard deviation (n - 1) over `untrained` and `untrained-<seed>`, nothing for a single seed.

    Of the means where the table has some, else of every metric.
    """
    at = [index for index, name in enumerate(comparison.systems) if _is_untrained(name)]
    summaries = [row for row in comparison.rows if row.summary]
    return [spread for row in summaries or comparison.rows if (spread := _spread(row, at))]


def _is_untrained(name: str) -> bool:
    base, _, seed = name.partition("-")
    return base == "untrained" and (not seed or seed.isdigit())


def _spread(row: Row, at: Sequence[int]) -> Spread | None:
    scores = [score for index in at if (score := row.cells[index].score) is not None]
    return Spread(row.metric, len(scores), fmean(scores), stdev(scores)) if len(scores) > 1 else None


# The teacher on the page: which it is, what that means, and how good one that was trained here was found to be.


@dataclass(frozen=True)
class TeacherFacts:
    """What is said of the teacher.

    Attributes:
        kind: as in `embed.teacher.kind`.
        meaning: what that means for the numbers.
        transform: kind of `embed.transform`, "none" without one.
        scores: of one trained here: a row a task, its score by system.
        worse: that it is no better than mean pooling, in words; None where it is or was not measured.
    """

    kind: str
    meaning: str
    transform: str
    scores: Mapping[str, Mapping[str, float]]
    worse: str | None


def teacher_facts(root: Path, trained: Mapping[str, Any] | None) -> TeacherFacts | None:
    """Of the workspace's targets; None where there are none. `trained` is the record of the stage teach, if it ran."""
    try:
        manifest = read_manifest(root / TARGETS_DIR).manifest
    except ArtifactError:
        return None
    identity = manifest.models.get("teacher")
    if not isinstance(identity, dict):
        return None
    kind = _kind(identity)
    record = (trained or {}) if kind == TRAINED else {}
    transform = manifest.params.get("transform") or {"kind": "none"}
    meaning = (TEACHERS[kind].meaning if kind in TEACHERS else "") + _text_of(record)
    return TeacherFacts(kind, meaning, transform["kind"], _scores(record), record.get("worse_than_mean_pooling"))


def trained_here(root: Path) -> bool:
    """Whether the workspace holds a teacher that the stage teach was asked for."""
    try:
        return bool(read_manifest(root / TEACHER_DIR).manifest.params.get("asked"))
    except ArtifactError:
        return False


def _text_of(record: Mapping[str, Any]) -> str:
    """What a teacher that was trained here read; of sources nobody looked for the held-out queries."""
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
