"""Checks of tables and tensors: schemas, ids one-to-one from queries to targets, finite numbers.

Tables are read batch by batch, safetensors files tensor by tensor; only id columns are held whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.audit.findings import QUERIES, RESPONSES, TARGETS, Findings
from pipeline.core import schemas
from pipeline.core.artifacts import Artifact
from pipeline.core.errors import ContractError
from pipeline.core.paths import HELDOUT_TABLE, TRAIN_TABLE
from pipeline.core.schemas import FINISH_REASONS, check_ids, targets_schema
from pipeline.core.text import query_id
from pipeline.core.vectors import matrix

BATCH_ROWS = 16_384
_NO_IDS = pa.array([], pa.string())


@dataclass(frozen=True)
class Responses:
    """Ids of the responses, and of those that must have a target."""

    ids: pa.Array
    usable: pa.Array


def check_rows(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Check the tables among `artifacts`, whose files are intact."""
    queries = _check_queries(artifacts[QUERIES], findings) if QUERIES in artifacts else None
    responses = _check_responses(artifacts[RESPONSES], findings) if RESPONSES in artifacts else None
    targets = _check_targets(artifacts[TARGETS], findings) if TARGETS in artifacts else None
    if queries is not None and responses is not None:
        findings.add_rows(RESPONSES, _minus(queries, responses.ids), "this query has no response row")
        findings.add_rows(RESPONSES, _minus(responses.ids, queries), "no query has this id")
    if responses is not None and targets is not None:
        findings.add_rows(TARGETS, _minus(responses.usable, targets), "this usable response has no target")
        findings.add_rows(TARGETS, _minus(targets, responses.usable), "no usable response has this id")


def _minus(ids: pa.Array, others: pa.Array) -> list[str]:
    return ids.filter(pc.invert(pc.is_in(ids, value_set=others))).to_pylist()


def _check_queries(artifact: Artifact, findings: Findings) -> pa.Array | None:
    name = QUERIES
    files = {path.name: path for path in artifact.tables()}
    if set(files) != {TRAIN_TABLE, HELDOUT_TABLE}:
        findings.add(name, "", f"holds {sorted(files)}, expected {TRAIN_TABLE} and {HELDOUT_TABLE}")
        return None
    splits = {}
    for file, path in files.items():
        if not _check_schema(name, path, schemas.QUERIES, artifact, findings):
            return None
        splits[file] = _ids(name, [path], findings)
        for batch in _batches(path):
            pairs = zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
            findings.add_rows(name, (row for row, text in pairs if row != query_id(text)), "is not the id of its text")
    train, heldout = splits[TRAIN_TABLE], splits[HELDOUT_TABLE]
    findings.add_rows(name, train.filter(pc.is_in(train, value_set=heldout)).to_pylist(), "is in train and in heldout")
    _check_count(name, artifact, len(train) + len(heldout), findings)
    return pa.concat_arrays([train, heldout])


def _check_responses(artifact: Artifact, findings: Findings) -> Responses | None:
    name = RESPONSES
    samples = schemas.samples_of(artifact.manifest.params)
    schema = schemas.responses_schema(samples)
    if not all(_check_schema(name, path, schema, artifact, findings) for path in artifact.tables()):
        return None
    if samples > 1:
        for batch in (batch for path in artifact.tables() for batch in _batches(path)):
            many = pc.greater(pc.list_value_length(batch.column(schemas.SAMPLES.name)), samples - 1)
            findings.add_rows(name, batch.column("id").filter(many).to_pylist(), f"has more than {samples} answers")
    ids = _ids(name, artifact.tables(), findings)
    usable = [_usable(batch, findings) for path in artifact.tables() for batch in _batches(path)]
    _check_count(name, artifact, len(ids), findings)
    return Responses(ids, pa.concat_arrays([_NO_IDS, *usable]))


def _usable(batch: pa.RecordBatch, findings: Findings) -> pa.Array:
    name, ids, reason = RESPONSES, batch.column("id"), batch.column("finish_reason")
    unknown = pc.invert(pc.is_in(reason, value_set=pa.array(FINISH_REASONS)))
    findings.add_rows(name, ids.filter(unknown).to_pylist(), f"finish_reason is not one of {', '.join(FINISH_REASONS)}")
    failed = pc.equal(reason, "error")
    silent = pc.and_(failed, pc.equal(pc.fill_null(batch.column("error"), ""), ""))
    findings.add_rows(name, ids.filter(silent).to_pylist(), "finish_reason is error without a reason in column 'error'")
    for column in ("prompt_tokens", "response_tokens"):
        negative = pc.less(batch.column(column), 0)
        findings.add_rows(name, ids.filter(negative).to_pylist(), f"{column} is negative")
    blank = pc.equal(pc.utf8_trim_whitespace(batch.column("response")), "")
    return ids.filter(pc.invert(pc.or_(failed, blank)))


def _check_targets(artifact: Artifact, findings: Findings) -> pa.Array | None:
    name, paths = TARGETS, artifact.tables()
    found = pq.read_schema(paths[0]) if paths else pa.schema([])
    kind = found.field("embedding").type if "embedding" in found.names else None
    if not isinstance(kind, pa.FixedSizeListType):
        findings.add(name, "", f"column 'embedding' is {kind}, expected a fixed-size list")
        return None
    dtype = "float16" if pa.types.is_float16(kind.value_type) else "float32"
    schema = targets_schema(kind.list_size, dtype, queries=bool(artifact.manifest.params.get("queries")))
    if not all(_check_schema(name, path, schema, artifact, findings) for path in paths):
        return None
    ids = _ids(name, paths, findings)
    for path in paths:
        for batch in _batches(path):
            for column in schema.names[1:]:
                findings.add_rows(name, _not_finite(batch, column), f"{column} holds NaN or infinite values")
    _check_count(name, artifact, len(ids), findings)
    return ids


def _not_finite(batch: pa.RecordBatch, column: str) -> list[str]:
    rows = np.flatnonzero(~np.isfinite(matrix(batch.column(column))).all(axis=1))
    return batch.column("id").take(pa.array(rows)).to_pylist()


def _check_schema(name: str, path: Path, schema: pa.Schema, artifact: Artifact, findings: Findings) -> bool:
    found = pq.read_schema(path)
    if found.equals(schema):
        return True
    columns = ", ".join(f"{field.name}: {field.type}" for field in found)
    expected = ", ".join(f"{field.name}: {field.type}" for field in schema)
    findings.add(name, path.relative_to(artifact.path).as_posix(), f"schema is ({columns}), must be ({expected})")
    return False


def _check_count(name: str, artifact: Artifact, rows: int, findings: Findings) -> None:
    if rows != artifact.manifest.rows:
        findings.add(name, "", f"holds {rows} rows, the manifest says {artifact.manifest.rows}")


def _ids(name: str, paths: list[Path], findings: Findings) -> pa.Array:
    chunks = [chunk for path in paths for chunk in pq.read_table(path, columns=["id"]).column("id").chunks]
    ids = pa.chunked_array(chunks, pa.string())
    try:
        check_ids(ids, name)
    except ContractError as error:
        where, _, what = str(error).removeprefix(f"{name}: id ").partition(" ")
        findings.add(name, where, what)
    return ids.combine_chunks() if ids.num_chunks else _NO_IDS


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def check_tensors(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Check every safetensors file among `artifacts`, one tensor in memory at a time."""
    for name, artifact in artifacts.items():
        for file in sorted(artifact.manifest.files):
            if file.endswith(".safetensors"):
                _check_file(name, file, artifact.path / file, findings)


def _check_file(name: str, file: str, path: Path, findings: Findings) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if not torch.isfinite(tensors.get_tensor(key)).all():
                    findings.add(name, file, f"tensor '{key}' holds NaN or infinite values")
    except (SafetensorError, OSError) as error:
        findings.add(name, file, f"is not readable: {error}")
