"""Show rows of an artifact, or one row through all stages: `python -m pipeline inspect STAGE [--n 5] [--id ID]`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from pipeline.core.artifacts import Artifact, read_manifest
from pipeline.core.errors import ArtifactError, first_line
from pipeline.core.paths import RESULTS_DIR, STAGE_ARTIFACTS
from pipeline.core.schemas import QUERY_EMBEDDING

TENSORS = {stage: STAGE_ARTIFACTS[stage] for stage in ("teach", "train")}
TABLES = {stage: path for stage, path in STAGE_ARTIFACTS.items() if stage not in TENSORS}
STAGES = (*STAGE_ARTIFACTS, "evaluate", "probe", "report")
FIRST_VALUES = 6
CELL_CHARS = 400


def check_stage(stage: str) -> None:
    """Raises ArtifactError if there is no such stage."""
    if stage not in STAGES:
        raise ArtifactError(f"unknown stage '{stage}' (known: {', '.join(STAGES)})")


def show(stage: str, count: int, root: Path = Path()) -> Table:
    """The first `count` rows of what a stage made; raises ArtifactError if it is unknown or has not run."""
    if stage in TABLES:
        return _rows_table(read_manifest(root / TABLES[stage]), count)
    if stage in TENSORS:
        return _tensors_table(read_manifest(root / TENSORS[stage]))
    check_stage(stage)
    return _results_table(root, stage, count)


def counts(stage: str, root: Path = Path()) -> Table | None:
    """What the stage counted while it made its table, one line a count; None for stages that make none."""
    if stage not in TABLES:
        return None
    artifact = read_manifest(root / TABLES[stage])
    table = _plain(f"{artifact.path}: {artifact.manifest.rows} rows", "count", "rows")
    for name, value in _leaves(artifact.manifest.counts):
        table.add_row(_cell(name), f"{value:,}" if isinstance(value, int) else _cell(value))
    return table


def failures(stage: str, count: int, root: Path = Path()) -> Table | None:
    """The first `count` rows that failed, with their reasons; None if there is none."""
    if stage != "generate":
        return None
    artifact = read_manifest(root / TABLES[stage])
    failed = pc.equal(pc.field("finish_reason"), "error")
    rows = [row for path in artifact.tables() for row in _filtered(path, failed)][:count]
    if not rows:
        return None
    total = artifact.manifest.counts.get("finish_reason", {}).get("error", len(rows))
    table = _plain(f"{artifact.path}: {len(rows)} of {total} rows that failed", "id", "error", "prompt_tokens")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in ("id", "error", "prompt_tokens")))
    return table


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested counts with their path as name; zeros are no news."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{key} / ")
        elif inner:
            yield f"{prefix}{key}", inner


def trace(row_id: str, root: Path = Path()) -> Table:
    """One row, by its id or a beginning of it that no other id shares, through all stages that have run.

    Raises:
        ArtifactError: no or several queries have this id, or there are no queries.
    """
    queries = read_manifest(root / TABLES["collect"])
    found = [(path.stem, row) for path in queries.tables() for row in _starting_with(path, row_id)]
    if len(found) != 1:
        problem = f"{len(found)} ids begin with '{row_id}': give more of it" if found else f"no query has id '{row_id}'"
        raise ArtifactError(f"{queries.path}: {problem}")
    split, query = found[0]
    table = _plain("one row through all stages", "stage", "what", "value")
    facts = {"id": query["id"], "text": query["text"], "split": split, "source": query["source"]}
    _add(table, "collect", facts)
    _add(table, "generate", _later_row(root, "generate", query["id"]))
    _add(table, "embed", _embedding_facts(_later_row(root, "embed", query["id"])))
    return table


def _later_row(root: Path, stage: str, row_id: str) -> dict[str, Any]:
    try:
        artifact = read_manifest(root / TABLES[stage])
    except ArtifactError:
        return {"": "not made yet"}
    rows = [row for path in artifact.tables() for row in _starting_with(path, row_id)]
    return {key: value for key, value in rows[0].items() if key != "id"} if rows else {"": f"no row in {artifact.path}"}


def _starting_with(path: Path, prefix: str) -> list[dict[str, Any]]:
    return _filtered(path, pc.starts_with(pc.field("id"), prefix))


def _filtered(path: Path, condition: pc.Expression) -> list[dict[str, Any]]:
    with _readable(path):
        return pq.read_table(path, filters=condition).to_pylist()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises ArtifactError if a file that is read in the block is missing or damaged, or has columns of other kinds."""
    from safetensors import SafetensorError

    try:
        yield
    except (pa.ArrowException, SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {first_line(error)}") from None


def _embedding_facts(row: dict[str, Any]) -> dict[str, Any]:
    if "embedding" not in row:
        return row
    vector = np.asarray(row["embedding"], dtype=np.float32)
    facts = {"dimensions": vector.size, "norm": _norm(vector), "first values": _first(vector)}
    if QUERY_EMBEDDING in row:
        query = np.asarray(row[QUERY_EMBEDDING], dtype=np.float32)
        facts |= {"norm of the query's": _norm(query), "its first values": _first(query)}
    return facts


def _norm(vector: "np.ndarray[Any, Any]") -> float:
    return round(float(np.linalg.norm(vector)), 4)


def _first(vector: "np.ndarray[Any, Any]") -> str:
    shown = ", ".join(f"{value:.4f}" for value in vector[:FIRST_VALUES])
    return f"{shown}, ..." if vector.size > FIRST_VALUES else shown


def _rows_table(artifact: Artifact, count: int) -> Table:
    rows = _head(artifact, count)
    columns = ["file", *(key for key in (rows[0] if rows else {}) if key != "file")]
    table = _plain(f"{artifact.path}: {len(rows)} of {artifact.manifest.rows} rows", *columns)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    return table


def _head(artifact: Artifact, count: int) -> list[dict[str, Any]]:
    """The first rows of every split, or of the parts together."""
    rows: list[dict[str, Any]] = []
    parts = all(path.name.startswith("part-") for path in artifact.tables())
    for path in artifact.tables():
        wanted = count - len(rows) if parts else count
        if wanted > 0:
            with _readable(path), pq.ParquetFile(path) as file:
                batch = next(file.iter_batches(batch_size=wanted), None)
            rows += [_flat({"file": path.stem, **row}) for row in (batch.to_pylist() if batch else [])]
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    vectors = {name: row.pop(name) for name in ("embedding", QUERY_EMBEDDING) if name in row}
    return row | _embedding_facts(vectors) if vectors else row


def _tensors_table(artifact: Artifact) -> Table:
    from safetensors import safe_open

    table = _plain(f"{artifact.path}: trained tensors", "file", "tensor", "shape", "dtype", "norm")
    for name in sorted(file for file in artifact.manifest.files if file.endswith(".safetensors")):
        with _readable(artifact.path / name), safe_open(artifact.path / name, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                tensor = tensors.get_tensor(key)
                norm = f"{tensor.float().norm():.4f}"
                table.add_row(name, key, str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch."), norm)
    return table


def _results_table(root: Path, stage: str, count: int) -> Table:
    folder = root / RESULTS_DIR
    files = sorted([*folder.glob(f"{stage}.json"), *(folder / stage).glob("*.json")])
    if not files:
        raise ArtifactError(f"{folder}/{stage}: nothing there, run the stage first")
    table = _plain(f"{folder}/{stage}", "file", "key", "value")
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{file} is damaged ({error}): run the stage again") from None
        for key, value in list(content.items())[:count] if isinstance(content, dict) else [("", content)]:
            table.add_row(file.name, key, _cell(value))
    return table


def _plain(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, stage: str, facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        table.add_row(stage, key, _cell(value))


def _cell(value: Any) -> str:
    """Text without control characters or markup, so that no row can dress up as something else."""
    from rich.markup import escape

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    visible = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
    return escape(visible[:CELL_CHARS] + ("..." if len(visible) > CELL_CHARS else ""))
