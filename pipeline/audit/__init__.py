"""Verify every artifact of a workspace: `python -m pipeline audit`.

Checks file hashes, schemas, row counts, ids one-to-one along queries -> responses -> targets, finite numbers, the
digests and model identities that link the artifacts and their sources, and dvc.lock. The content of a damaged file is
not checked. A model or a source that is not in this workspace cannot be verified, which is said and is no finding.
"""

from collections.abc import Collection
from pathlib import Path

from pipeline.audit import chain, lock, tables
from pipeline.audit.findings import ENCODER, QUERIES, RESPONSES, TARGETS, TEACHER, AuditReport, Findings
from pipeline.core.artifacts import MANIFEST, Artifact, damaged_files, read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.paths import EVALUATE_DIR, PROBE_DIR

__all__ = ["AuditReport", "audit"]

# Kind by artifact, in the order of the pipeline. The teacher is apart: only targets of a trained teacher depend on it.
CHAIN = {
    QUERIES: "queries",
    RESPONSES: "responses",
    TARGETS: "targets",
    ENCODER: "encoder",
}


def audit(root: Path = Path(), *, being_written: Collection[Path] = ()) -> AuditReport:
    """Verify all artifacts below `root`; outs `being_written` are not compared with dvc.lock, which lacks them yet."""
    findings = Findings()
    names = [*CHAIN, *_result_names(root)]
    names.insert(names.index(TARGETS), TEACHER)
    present = [name for name in names if (root / name).is_dir()]
    missing = [name for name in CHAIN if name not in present]
    for name in missing:
        if downstream := [later for later in names[names.index(name) + 1 :] if later in present]:
            findings.add(name, "", f"missing, though {downstream[0]} was made after it")
    opened = {name: artifact for name in present if (artifact := _open(root, name, findings))}
    intact = {name: artifact for name, artifact in opened.items() if not _damaged(name, artifact, findings)}
    tables.check_rows(intact, findings)
    tables.check_tensors(intact, findings)
    chain.check_inputs(root, opened, findings)
    chain.check_sources(root, opened, findings)
    chain.check_models(root, opened, findings)
    chain.check_trained_teacher(root, opened, findings)
    chain.check_width(intact, findings)
    chain.check_share(intact, findings)
    chain.check_transform(intact, findings)
    # A damaged artifact differs from the lock too: once is enough.
    locked = lock.check_lock(root, {*opened, *map(Path.as_posix, being_written)} - set(intact), bool(present), findings)
    verified = {name: artifact for name, artifact in intact.items() if name not in findings.artifacts()}
    return AuditReport.of(findings, verified, missing, locked)


def _result_names(root: Path) -> list[str]:
    folders = [folder for parent in (EVALUATE_DIR, PROBE_DIR) for folder in (root / parent).glob("*")]
    return sorted(folder.relative_to(root).as_posix() for folder in folders if folder.is_dir())


def _open(root: Path, name: str, findings: Findings) -> Artifact | None:
    try:
        artifact = read_manifest(root / name)
    except ArtifactError as error:
        findings.add(name, MANIFEST, str(error))
        return None
    expected = "teacher" if name == TEACHER else CHAIN.get(name)
    if expected and artifact.manifest.kind != expected:
        findings.add(name, MANIFEST, f"holds '{artifact.manifest.kind}', expected '{expected}'")
        return None
    return artifact


def _damaged(name: str, artifact: Artifact, findings: Findings) -> bool:
    problems = damaged_files(artifact)
    for problem in problems:
        file, _, what = problem.removeprefix(f"{artifact.path}/").partition(": ")
        findings.add(name, file, what)
    return bool(problems)
