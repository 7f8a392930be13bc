"""Artifact folders: written whole or not at all, described by a deterministic manifest, verified when read.

An artifact appears in one rename, after its files and its manifest reached the disk. The manifest holds what determines
the content (params, model identities, digests of inputs and sources) and the content's hashes, and its own: equal work
gives equal bytes.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import ArtifactError
from pipeline.core.files import (
    PARQUET_OPTIONS,
    bytes_sha256,
    digest_of,
    disk_errors,
    file_sha256,
    fsync_path,
    to_json,
    write_bytes,
    write_parquet,
)
from pipeline.core.folders import replace_folder, scratch_beside

# 2: `sources`, and the manifest's own sha256. Format 1 has neither and is still read.
FORMAT_VERSION = 2
READ_VERSIONS = (1, FORMAT_VERSION)
MANIFEST = "manifest.json"
PART_BYTES = 128 * 2**20
PIECES = 8
"""A part is made in so many pieces, one in memory at a time: of an eighth, copies and compressed bytes cost little."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and the sha256 of each of its files.

    Attributes:
        inputs: digest of the manifest of each artifact that was read, by its path.
        sources: sha256 of each file, folder or data set that is no artifact, by its path or name.
    """

    kind: str
    rows: int
    files: dict[str, str]
    schemas: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """The file `manifest.json`: canonical JSON with the digest of all other keys as `sha256`."""
        content = json.loads(to_json(asdict(self)))  # as it will be read: keys that are numbers become strings
        return to_json({**content, "sha256": digest_of(content)}).encode()


class ArtifactWriter:
    """Collects the files of one artifact; `create` commits them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Any] = {}
        self._rows = 0
        self._schemas: dict[str, str] = {}

    def write_table(self, name: str, table: pa.Table) -> None:
        """Add a table as the Parquet file `name`."""
        write_parquet(table, self.path / name)
        self._rows += table.num_rows
        self._schemas[name] = str(table.schema)

    def write_stream(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Add tables that follow one another as one Parquet file, the same bytes as of one table."""
        options = {key: value for key, value in PARQUET_OPTIONS.items() if key != "row_group_size"}
        group, pending = PARQUET_OPTIONS["row_group_size"], schema.empty_table()
        with pq.ParquetWriter(self.path / name, schema, **options) as file:
            for table in tables:
                pending = pa.concat_tables([pending, table])
                while pending.num_rows >= group:
                    file.write_table(pending.slice(0, group).combine_chunks())
                    pending = pending.slice(group)
                self._rows += table.num_rows
            if pending.num_rows:
                file.write_table(pending.combine_chunks())
        self._schemas[name] = str(schema)

    def write_parts(self, tables: Iterable[pa.Table], schema: pa.Schema, rows: int | None = None) -> None:
        """Add tables as `part-00000.parquet`, ...; no table at all gives one empty part.

        With `rows` the tables follow one another, whatever their sizes, and are parts of so many rows together. A row
        group is written as soon as its rows are there.
        """
        part = -1
        numbered = enumerate(tables) if rows is None else _numbered(tables, rows)
        for part, pieces in groupby(numbered, key=itemgetter(0)):
            self.write_stream(f"part-{part:05d}.parquet", (table for _, table in pieces), schema)
        if part < 0:
            self.write_table("part-00000.parquet", schema.empty_table())

    def finish(self, description: Mapping[str, Any]) -> None:
        """Flush every file, then write the manifest."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        for file in files:
            file.chmod(0o644)
            fsync_path(file)
        manifest = Manifest(
            rows=self._rows,
            files={file.relative_to(self.path).as_posix(): file_sha256(file) for file in files},
            schemas=self._schemas,
            counts=self.counts,
            **description,
        )
        write_bytes(self.path / MANIFEST, manifest.to_bytes())


def _numbered(tables: Iterable[pa.Table], rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Tables that follow one another, cut where a part of `rows` rows ends, each with the number of its part."""
    done = 0
    for table in tables:
        while table.num_rows:
            piece = table.slice(0, rows - done % rows)
            yield done // rows, piece
            done, table = done + piece.num_rows, table.slice(piece.num_rows)


@contextlib.contextmanager
def create(
    target: Path,
    *,
    kind: str,
    params: Mapping[str, Any],
    models: Mapping[str, Any] | None = None,
    inputs: Iterable["Artifact"] = (),
    sources: Mapping[str, str] | None = None,
) -> Iterator[ArtifactWriter]:
    """Write the artifact folder `target`: it exists complete after the block, or stays as it was.

    Args:
        params: resolved, all that determine its content.
        models: identities of the models that made it, by role.
        sources: see `Manifest`.

    Raises:
        WorkError: the disk is full or not writable.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        with scratch_beside(target) as scratch:
            new = scratch / "new"
            new.mkdir()
            writer = ArtifactWriter(new)
            yield writer
            writer.finish(
                {
                    "kind": kind,
                    "params": dict(params),
                    "models": dict(models or {}),
                    "inputs": {artifact.path.as_posix(): artifact.digest for artifact in inputs},
                    "sources": dict(sources or {}),
                }
            )
            new.chmod(0o755)
            replace_folder(target, new)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest was read; its files are verified by `open_artifact`."""

    path: Path
    manifest: Manifest
    digest: str

    def tables(self) -> list[Path]:
        """Its Parquet files in order."""
        return [self.path / name for name in sorted(self.manifest.files) if name.endswith(".parquet")]

    def read(self, name: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """One table by file name, or all parts in order as one; raises ArtifactError if a file is not readable."""
        paths = [self.path / name] if name else self.tables()
        try:
            return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{self.path}: {error}") from None

    def batches(self, columns: list[str], rows: int, name: str | None = None) -> Iterator[pa.Table]:
        """One table by file name, or all parts in order, as tables of at most `rows` rows; raises as `read`.

        One row group is in memory at a time.
        """
        for path in [self.path / name] if name else self.tables():
            try:
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group, columns=columns)
                        yield from (table.slice(start, rows) for start in range(0, table.num_rows, rows))
            except (pa.ArrowInvalid, OSError) as error:
                raise ArtifactError(f"{path}: {error}") from None


def read_manifest(path: Path) -> Artifact:
    """The artifact in `path`, its files unverified.

    Raises:
        ArtifactError: there is none, its manifest is damaged, or it has a format version that is not read.
    """
    manifest_path = path / MANIFEST
    try:
        raw = manifest_path.read_bytes()
        content = json.loads(raw)
        found = content.get("format_version")
        if found not in READ_VERSIONS:
            raise ArtifactError(f"{manifest_path}: format version {found}, this code reads {FORMAT_VERSION}: rerun it")
        signed = content.pop("sha256", None) is not None
        manifest = Manifest(**content)
        _check_kinds(manifest)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not a finished artifact (no {MANIFEST}): run the stage that makes it") from None
    except NotADirectoryError:
        raise ArtifactError(f"{path} is not a folder, as an artifact is: run the stage that makes it") from None
    except OSError as error:
        raise ArtifactError(f"{manifest_path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{manifest_path} is damaged ({error}): run the stage again") from None
    if (signed or found == FORMAT_VERSION) and raw != manifest.to_bytes():
        raise ArtifactError(f"{manifest_path} is damaged (its sha256 is another): run the stage again")
    return Artifact(path, manifest, bytes_sha256(raw))


def _check_kinds(manifest: Manifest) -> None:
    """Raises TypeError if a value is of another kind than readers take."""
    kinds: dict[str, type] = {"kind": str, "rows": int, "format_version": int}
    for each in fields(manifest):
        value = getattr(manifest, each.name)
        if not isinstance(value, kinds.get(each.name, dict)):
            raise TypeError(f"{each.name} is {value!r}")


def open_artifact(path: Path, kind: str) -> Artifact:
    """The artifact in `path` after verifying the sha256 of all its files.

    Raises:
        ArtifactError: missing, of another kind, or a file differs from its manifest.
    """
    artifact = read_manifest(path)
    if artifact.manifest.kind != kind:
        raise ArtifactError(f"{path} holds '{artifact.manifest.kind}', expected '{kind}'")
    problems = damaged_files(artifact)
    if problems:
        raise ArtifactError("\n".join(problems))
    return artifact


def damaged_files(artifact: Artifact) -> list[str]:
    """One line for each file that is missing, changed or not in the manifest."""
    problems = []
    for name, expected in sorted(artifact.manifest.files.items()):
        file = artifact.path / name
        try:
            found = file_sha256(file)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            problems.append(f"{file}: missing, though the manifest lists it")
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
        else:
            if found != expected:
                problems.append(f"{file}: sha256 is {found[:12]}..., the manifest says {expected[:12]}...")
    present = {file.relative_to(artifact.path).as_posix() for file in artifact.path.rglob("*") if file.is_file()}
    strangers = present - {MANIFEST} - set(artifact.manifest.files)
    return problems + [f"{artifact.path / name}: not in the manifest" for name in sorted(strangers)]


def check_new(out: Path) -> None:
    """Raises ArtifactError if `out`, which an export is to make, exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} exists already: name a new folder, or remove it")
