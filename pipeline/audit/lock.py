"""dvc.lock against the files, with DVC's own hashes: md5 of a file, md5 of the sorted listing of a folder."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.audit.findings import Findings
from pipeline.core.config import read_yaml
from pipeline.core.errors import ParamsError

LOCK = "dvc.lock"


def check_lock(root: Path, damaged: set[str], anything_made: bool, findings: Findings) -> int | None:
    """Compare each out that dvc.lock lists with what is there; how many there are, None without a dvc.lock.

    Args:
        damaged: artifacts that are known to differ from what was made.
        anything_made: whether the workspace holds any artifact; if not, missing outs are simply not made yet.
    """
    path = root / LOCK
    if not path.is_file():
        return None
    try:
        stages = read_yaml(path).get("stages") or {}
    except ParamsError as error:
        findings.add(LOCK, "", str(error))
        return 0
    count = 0
    for stage, out in _outs(stages):
        name = str(out["path"])
        if name in damaged:
            continue
        if not (root / name).exists():
            if anything_made:
                findings.add(LOCK, name, f"is missing, though stage {stage} made it: run `dvc repro` or `dvc checkout`")
            continue
        count += 1
        found = dvc_md5(root / name)
        if found != out.get("md5"):
            findings.add(LOCK, name, f"md5 is {found}, stage {stage} made {out.get('md5')}: changed after the run")
    return count


def dvc_md5(path: Path) -> str:
    """The md5 by which DVC 3 knows a file or a folder."""
    if path.is_file():
        return _file_md5(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    entries = [{"md5": _file_md5(files[name]), "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _outs(stages: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage, entry in stages.items():
        for out in (entry or {}).get("outs") or []:
            yield stage, out


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
