"""A finished run: a workspace folder, a git revision, or a DVC experiment."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.artifacts import MANIFEST
from pipeline.core.config import PARAMS_FILE, parse_yaml
from pipeline.core.errors import EvaluationError
from pipeline.core.paths import EVALUATE_DIR, PROBE_DIR, RESULTS_DIR, ROWS_TABLE, STAGE_ARTIFACTS, SUMMARY_TABLE
from pipeline.evaluate.unit_scores import UNIT_SCORES_DIR, UnitScores, from_bytes

STUDENT = "student"


@dataclass(frozen=True)
class Run:
    """The results of a run; `files` is a file system of fsspec whose root is the workspace."""

    name: str
    files: Any

    @property
    def suites(self) -> list[str]:
        return self._made(EVALUATE_DIR)

    @property
    def probes(self) -> list[str]:
        return self._made(PROBE_DIR)

    def params(self) -> dict[str, Any]:
        """The whole of params.yaml; empty without the file."""
        return parse_yaml(self._bytes(PARAMS_FILE), f"{self.name}: {PARAMS_FILE}") if self._has(PARAMS_FILE) else {}

    def suite_manifest(self, suite: str) -> Mapping[str, Any]:
        return self._json(EVALUATE_DIR / suite / MANIFEST)

    def summary(self, suite: str) -> pa.Table:
        """The suite's scores, see `evaluate.summary.SUMMARY`."""
        return self._table(EVALUATE_DIR / suite / SUMMARY_TABLE)

    def unit_scores(self, suite: str, task: str) -> list[UnitScores]:
        """The student's on a task; empty if the run did not publish any."""
        path = EVALUATE_DIR / suite / UNIT_SCORES_DIR / f"{task}.npz"
        return (from_bytes(self._bytes(path)) or []) if self._has(path) else []

    def probe_result(self, probe: str) -> Mapping[str, Any]:
        return self._json(PROBE_DIR / probe / "result.json")

    def probe_manifest(self, probe: str) -> Mapping[str, Any]:
        return self._json(PROBE_DIR / probe / MANIFEST)

    def probe_rows(self, probe: str) -> pa.Table:
        """The measurements of the student alone."""
        rows = self._table(PROBE_DIR / probe / ROWS_TABLE)
        return rows.filter(pc.equal(rows["system"], STUDENT)) if "system" in rows.column_names else rows

    def records(self) -> dict[str, Mapping[str, Any]]:
        """The records of the stages that have one, by stage, in the order of the pipeline."""
        names = {stage: RESULTS_DIR / f"{stage}.json" for stage in STAGE_ARTIFACTS}
        names |= {f"evaluate {name}": EVALUATE_DIR / f"{name}.json" for name in self.suites}
        names |= {f"probe {name}": PROBE_DIR / f"{name}.json" for name in self.probes}
        return {name: self._json(path) for name, path in names.items() if self._has(path)}

    def _made(self, folder: Path) -> list[str]:
        """Names of the artifacts in a folder."""
        if not self._has(folder):
            return []
        names = sorted(Path(entry).name for entry in self.files.ls(folder.as_posix(), detail=False))
        return [name for name in names if self._has(folder / name / MANIFEST)]

    def _has(self, path: Path) -> bool:
        return bool(self.files.exists(path.as_posix()))

    def _bytes(self, path: Path) -> bytes:
        try:
            return bytes(self.files.cat_file(path.as_posix()))
        except OSError as error:
            raise EvaluationError(f"{self.name}: {path} cannot be read ({error}): run it, or `dvc pull` it") from None

    def _text(self, path: Path) -> str:
        return self._bytes(path).decode("utf-8")

    def _json(self, path: Path) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = json.loads(self._text(path))
        except ValueError as error:
            raise EvaluationError(f"{self.name}: {path} is damaged ({error})") from None
        return found

    def _table(self, path: Path) -> pa.Table:
        try:
            return pq.read_table(io.BytesIO(self._bytes(path)))
        except pa.ArrowInvalid as error:
            raise EvaluationError(f"{self.name}: {path} is damaged ({error})") from None


def open_run(name: str) -> Run:
    """The run in a folder, or of a git revision or DVC experiment of the repository in the working directory.

    Raises:
        EvaluationError: `name` is neither, or the run has no results.
    """
    run = Run(name, _folder(Path(name)) if Path(name).is_dir() else _revision(name))
    if not run.suites and not run.probes:
        raise EvaluationError(f"'{name}' has no {EVALUATE_DIR} and no {PROBE_DIR}: run it with `dvc repro` first")
    return run


def _folder(path: Path) -> Any:
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    return DirFileSystem(str(path.resolve()), LocalFileSystem())


def _revision(name: str) -> Any:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        files = DVCFileSystem(".", rev=name)
        files.repo  # noqa: B018  opened at first use; its `exists` takes any failure for a missing file
        return files
    except (DvcException, SCMError) as error:
        raise EvaluationError(
            f"'{name}' is no folder, and no git revision or DVC experiment of this repository ({error})"
        ) from None
