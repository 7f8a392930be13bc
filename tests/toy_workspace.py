"""A finished workspace of five queries, written through the same functions as the stages use."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.artifacts import MANIFEST, Manifest, create, read_manifest
from pipeline.core.files import bytes_sha256, file_sha256, write_parquet
from pipeline.core.schemas import QUERIES, RESPONSES, targets_schema
from pipeline.core.text import query_id

BACKBONE = {"name": "org/backbone", "revision": "a" * 40}
TEACHER = {"name": "org/teacher", "revision": "b" * 40}
TEXTS = {"train": ["one", "two", "three"], "heldout": ["four", "five"]}
WIDTH = 3
FAILED, EMPTY = "three", "four"


def row_id(text: str) -> str:
    """The id of a query in the toy workspace."""
    return query_id(text)


IDS = {text: row_id(text) for texts in TEXTS.values() for text in texts}
USABLE = sorted(row for text, row in IDS.items() if text not in (FAILED, EMPTY))


def make_workspace(root: Path, backbone: dict[str, str] = BACKBONE, teacher: dict[str, str] = TEACHER) -> None:
    """Write every artifact of the chain, and an evaluation and a probe made from the encoder."""
    write_queries(root)
    write_responses(root, backbone)
    write_targets(root, teacher)
    write_encoder(root, backbone, teacher)
    write_result(root, "results/evaluate/demo", {"scores.json": {"main": 0.5}})
    write_result(root, "results/probe/interpret", {"samples.json": []})


def write_queries(root: Path) -> None:
    with create(root / "data/queries", kind="queries", params={"seed": 0}) as writer:
        for split, texts in TEXTS.items():
            rows = [{"id": row_id(text), "text": text, "source": "toy"} for text in texts]
            writer.write_table(f"{split}.parquet", table(rows, QUERIES))


def write_responses(root: Path, backbone: dict[str, str] = BACKBONE) -> None:
    rows = [_response(text) for text in IDS]
    inputs = [read_manifest(root / "data/queries")]
    models = {"backbone": backbone}
    with create(root / "data/responses", kind="responses", params={}, models=models, inputs=inputs) as writer:
        writer.counts = {"failed": 1, "empty": 1}
        writer.write_parts(parts(rows, RESPONSES), RESPONSES)


def _response(text: str) -> dict[str, Any]:
    failed = text == FAILED
    return {
        "id": row_id(text),
        "response": "" if failed else "  \n" if text == EMPTY else f"answer to {text}",
        "finish_reason": "error" if failed else "stop",
        "prompt_tokens": 7,
        "response_tokens": 0 if failed else 4,
        "error": "prompt too long" if failed else None,
    }


def write_targets(root: Path, teacher: dict[str, str] = TEACHER, *, queries: bool = False) -> None:
    rows: list[dict[str, Any]] = [
        {"id": row, "embedding": [0.5, float(index), -1.0]} for index, row in enumerate(USABLE)
    ]
    for row in rows if queries else ():
        row["query_embedding"] = [-value for value in row["embedding"]]
    schema = targets_schema(WIDTH, "float32", queries=queries)
    made: dict[str, Any] = {"params": {"queries": True} if queries else {}, "models": {"teacher": teacher}}
    made["inputs"] = [read_manifest(root / "data/responses")]
    with create(root / "data/targets", kind="targets", **made) as writer:
        writer.write_parts(parts(rows, schema), schema)


def write_encoder(root: Path, backbone: dict[str, str] = BACKBONE, teacher: dict[str, str] = TEACHER) -> None:
    from safetensors.numpy import save_file

    inputs = [read_manifest(root / "data/responses"), read_manifest(root / "data/targets")]
    models = {"backbone": backbone, "teacher": teacher}
    with create(root / "models/encoder", kind="encoder", params={}, models=models, inputs=inputs) as writer:
        save_file({"tokens": np.ones((2, 4), dtype=np.float32)}, writer.path / "student.safetensors")
        (writer.path / "encoder_config.json").write_text(json.dumps({"width": WIDTH}))


def write_result(root: Path, name: str, files: dict[str, Any]) -> None:
    inputs = [read_manifest(root / "models/encoder")]
    with create(root / name, kind=name.split("/")[1], params={}, inputs=inputs) as writer:
        for file, content in files.items():
            (writer.path / file).write_text(json.dumps(content))


def table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows sorted by id."""
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]), schema=schema)


def parts(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> list[pa.Table]:
    """Rows sorted by id in tables of two."""
    whole = table(rows, schema)
    return [whole.slice(start, 2) for start in range(0, whole.num_rows, 2)]


def rewrite(root: Path, name: str, file: str, change: Callable[[pa.Table], pa.Table], **manifest: Any) -> None:
    """Change a table and make its own manifest agree, as if the stage had written it so.

    Args:
        root: the workspace.
        name: the artifact.
        file: the Parquet file in it.
        change: the table's replacement.
        manifest: other keys of the manifest to replace.
    """
    import pyarrow.parquet as pq

    path = root / name / file
    write_parquet(change(pq.read_table(path)), path)
    edit_manifest(root, name, files={file: file_sha256(path)}, **manifest)


def edit_manifest(root: Path, name: str, **changes: Any) -> None:
    """Merge changes into an artifact's manifest and restamp the input digests downstream of it."""
    path = root / name / MANIFEST
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    write_manifest(path, content)
    for later in (
        "data/responses",
        "data/targets",
        "models/encoder",
        "results/evaluate/demo",
        "results/probe/interpret",
    ):
        restamp(root, later)


def restamp(root: Path, name: str) -> None:
    """Make an artifact's input digests those of the inputs as they are now."""
    path = root / name / MANIFEST
    content = json.loads(path.read_text())
    content["inputs"] = {key: bytes_sha256((Path(key) / MANIFEST).read_bytes()) for key in content["inputs"]}
    write_manifest(path, content)


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest whose own sha256 agrees with it."""
    path.write_bytes(Manifest(**{key: value for key, value in content.items() if key != "sha256"}).to_bytes())


def flip_byte(path: Path, at: int) -> None:
    """Invert one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(bytes(content))
