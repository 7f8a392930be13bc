"""Artifact folders: written whole or not at all, described by a deterministic manifest, verified when read.

An artifact appears in one rename, after its files and its manifest reached the disk. The manifest holds what determines
the content (params, model identities, digests of inputs and sources) and the content's hashes, and its own: equal work
gives equal bytes.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.core.errors import ArtifactError, PipelineError, WorkError
from pipeline.core.fault_points import fault_point

# 2: `sources`, and the manifest's own sha256. Format 1 has neither and is still read.
FORMAT_VERSION = 2
READ_VERSIONS = (1, FORMAT_VERSION)
MANIFEST = "manifest.json"
PART_BYTES = 128 * 2**20
PIECES = 8
"""A part is made in so many pieces, one in memory at a time: of an eighth, copies and compressed bytes cost little."""
_PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "version": "2.6",
    "use_dictionary": False,
    "row_group_size": 4096,
}


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


def to_json(value: Any) -> str:
    """Canonical JSON for files: sorted keys, two spaces, one newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value, independent of key order."""
    return bytes_sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def bytes_sha256(content: bytes | pa.Buffer) -> str:
    """sha256 (hex) of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_REFUSED = (errno.EACCES, errno.EPERM)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)
_QUOTED = re.compile("'(/?[^']+)'")  # pyarrow names the file in its message alone
# safetensors, and shutil of a folder, name the error in their message alone.
_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)")


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in place of a folder into a WorkError that names the place.

    A missing permission of a file that is no part of `where` is about that file: the block may also read.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        number, place = _number(error), _place(error)
        if number in _NO_FOLDER and (blocking := _file_above(place or where)):
            raise WorkError(f"{blocking} is a file, where a folder is needed: move it away, and run again") from error
        if number in _REFUSED and place is not None and not _belongs(place, where):
            raise WorkError(f"cannot open {place}: {os.strerror(number)}") from error
        if number not in (*_FULL, *_REFUSED):
            raise
        raise WorkError(
            f"cannot write {where}: {os.strerror(number)}. Finished work is kept; free space or choose another "
            "place (PIPELINE_WORK_DIR moves work in progress) and run again"
        ) from error


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 if it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _ERROR.search(str(error))
    return int(found[1]) if found else 0


def _place(error: Exception) -> Path | None:
    """The file that an error is about, if it says so."""
    named = getattr(error, "filename", None)
    if isinstance(named, str | os.PathLike):
        return Path(named)
    quoted = _QUOTED.search(str(error))
    return Path(quoted[1]) if quoted else None


def _file_above(path: Path) -> Path | None:
    """The first of `path` and the folders that it needs that is a file."""
    return next((part for part in reversed([path, *path.parents]) if part.is_file()), None)


def _belongs(place: Path, where: Path) -> bool:
    """Whether `place` is `where`, a part of it, a scratch name of it, or a folder that it needs."""
    place, where = place.absolute(), where.absolute()
    if place in (where, *where.parents):
        return True
    above = where.parent
    if above not in place.parents:
        return False
    name = place.relative_to(above).parts[0]
    return name == where.name or name.startswith(f".{where.name}.")


def write_bytes(path: Path, content: bytes | pa.Buffer) -> None:
    """Write a file atomically: temporary name in the same folder, fsync, rename."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            fault_point("file.rename")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_bytes(path, to_json(value).encode())


def write_parquet(table: pa.Table, path: Path | pa.NativeFile) -> None:
    """Write one Parquet file with options that make equal tables equal bytes."""
    pq.write_table(table, path, **_PARQUET_OPTIONS)


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
        options = {key: value for key, value in _PARQUET_OPTIONS.items() if key != "row_group_size"}
        group, pending = _PARQUET_OPTIONS["row_group_size"], schema.empty_table()
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
            _replace_folder(target, new)


_LOCK = "lock"
_OLD = "old"


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is this process's alone while it lives; what killed ones left there goes."""
    _recover(target)
    scratch, lock = _locked_folder(target)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _locked_folder(target: Path) -> tuple[Path, FileLock]:
    while True:
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.tmp-"))
        lock = FileLock(scratch / _LOCK)
        with contextlib.suppress(Timeout, FileNotFoundError):
            lock.acquire(blocking=False)
            if (scratch / _LOCK).exists():
                return scratch, lock
            lock.release()  # another writer took the folder, not locked yet, for a leftover


def _recover(target: Path) -> None:
    """Remove what killed writers of `target` left; what a live one writes stays.

    One that was killed between the two renames of `_replace_folder` moved the old artifact away: it comes back.
    """
    for leftover in sorted(target.parent.glob(f".{target.name}.tmp-*")):
        lock = FileLock(leftover / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # its writer lives, or has just ended
            continue
        try:
            if (leftover / _OLD).exists() and not target.exists():
                (leftover / _OLD).rename(target)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            lock.release()


def _replace_folder(target: Path, new: Path) -> None:
    fault_point("artifact.commit")
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # Two renames, not a removal and a rename: deleting a large artifact takes long enough to be killed in.
        target.rename(new.with_name(_OLD))
        fault_point("artifact.swap")
        new.rename(target)
    fsync_path(target.parent)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two paths name, in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


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
