"""Which files a path names, and the lines of a text file.

A path is a file, a folder or a pattern (`data/*.jsonl.gz`). The ending says the format, in upper or lower case, and
.gz, .zst or .bz2 behind it the compression. Text is UTF-8, or what a byte order mark says.
"""

import codecs
import contextlib
import glob
import hashlib
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.core.errors import SourceError, first_line, nested_in
from pipeline.core.files import disk_errors

JSON = (".jsonl", ".ndjson", ".json")
FORMATS = (".parquet", *JSON, ".csv", ".tsv", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
CHUNK = 2**16  # bytes or characters that are read together
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


@dataclass(frozen=True)
class File:
    """One file; `format` is one of FORMATS, `compression` as pyarrow calls it, `label` its name in messages."""

    path: Path
    format: str
    compression: str | None = None
    label: str = ""

    def __str__(self) -> str:
        return self.label or str(self.path)


def file_of(path: Path) -> File:
    """A file by its name; raises SourceError if its ending is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    ending = suffixes[-1] if suffixes else ""
    if ending not in FORMATS or (packed and ending == ".parquet"):
        known = f"known: {', '.join(FORMATS)}; text also packed: {', '.join(COMPRESSIONS)}"
        raise SourceError(f"{path}: unknown format '{ending}{packed}' ({known})", argument="path")
    return File(path, ending, COMPRESSIONS.get(packed))


def find_files(path: Path) -> list[File]:
    """The files that a path names: itself, those of a folder at any depth, or those of a pattern, by their names.

    Hidden files of a folder, and files whose ending is unknown, do not count.

    Raises:
        SourceError: there is none, a format is unknown, or a folder holds several formats.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.exists() or not glob.has_magic(str(path)):
            if not path.is_file():
                problem = "is no regular file" if path.exists() else "does not exist"
                file_of(path)  # of a name that could never be read, the format is the better news
                raise SourceError(f"{path} {problem}", argument="path")
            return [file_of(path)]
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = [file_of(match) for match in sorted(matches) if not match.is_dir()]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", argument="path") from None
    if not found:
        raise SourceError(f"no file matches {path}", argument="path")
    return _there(found)


def _in_folder(folder: Path) -> list[File]:
    found: list[File] = []
    for path in _below(folder, ()):
        with contextlib.suppress(SourceError):
            found.append(file_of(path))
    formats = sorted({file.format for file in found})
    if not found:
        raise SourceError(f"{folder} holds no file of a known format ({', '.join(FORMATS)})", argument="path")
    if len(formats) > 1:
        pattern = f"'{folder}/*{formats[0]}'"
        raise SourceError(f"{folder} holds {' and '.join(formats)}: name one kind, as in {pattern}", argument="path")
    return _there(found)


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Files at any depth, behind links too; unlike a glob, it raises OSError where a folder may not be read."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()) if real not in above else ():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _below(path, (*above, real))
        else:
            yield path


def _there(files: list[File]) -> list[File]:
    """The files; raises SourceError if one is a link to nothing, as a cache leaves them that was emptied."""
    for file in files:
        if not file.path.is_file():
            raise SourceError(f"{file} is a link to nothing, or no regular file", argument="path")
    return files


@contextlib.contextmanager
def spooled(stream: IO[bytes], ending: str, folder: Path) -> Iterator[tuple[File, str]]:
    """Standard input as a file below `folder`, for as long as the block runs, and the sha256 of its bytes.

    `ending` says the format ("jsonl", "csv.gz"); raises SourceError if it is unknown, WorkError if the disk is full.
    """
    name = f"stdin.{ending.lstrip('.')}"
    with nested_in(names={"path": "format"}):
        file_of(Path(name))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder, prefix="stdin-"))
    try:
        digest = hashlib.sha256()
        with disk_errors(folder), (place / name).open("wb") as copy:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        yield replace(file_of(place / name), label="standard input"), digest.hexdigest()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def check_not_read(output: Path, read: Path | None) -> None:
    """Raises SourceError if an output is a folder or, by whatever path or link, one of the files that are read."""
    if output.is_dir():
        raise SourceError(f"{output} is a folder: give the name of a file", argument="output")
    if read is None:
        return
    if output.exists() and read.exists() and output.samefile(read):
        raise SourceError(f"{output} is read itself and would be lost: give another name", argument="output")
    place = output.parent.resolve() / output.name
    within = read.is_dir() and place.is_relative_to(read.resolve())
    if within or (glob.has_magic(str(read)) and place.match(str(read.absolute()))):
        message = f"{output} would be read together with {read} the next time: put it elsewhere"
        raise SourceError(message, argument="output")


@contextlib.contextmanager
def damage(what: object, kind: str) -> Iterator[None]:
    """Errors of reading inside are SourceErrors: the file is damaged or no `kind` file."""
    try:
        yield
    except PermissionError:
        raise SourceError(f"{what} cannot be read: permission denied", argument="path") from None
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{what} is damaged or no {kind} file: {first_line(error)}") from None


@contextlib.contextmanager
def open_bytes(file: File) -> "Iterator[io.BufferedReader[Any]]":
    """The unpacked bytes of a file; raises SourceError if it cannot be read or is damaged."""
    with (
        damage(file, file.compression or file.format[1:]),
        pa.input_stream(str(file.path), compression=file.compression, buffer_size=CHUNK) as stream,
    ):
        reader = io.BufferedReader(cast(Any, stream), CHUNK)
        try:
            yield reader
        finally:
            reader.detach()  # closed late, it would complain that the stream is closed


@contextlib.contextmanager
def open_text(file: File) -> Iterator[IO[str]]:
    """A file as text, with its line ends as they are.

    Raises:
        SourceError: the file cannot be read, or a byte is no text in its encoding; nothing is replaced.
    """
    with open_bytes(file) as raw:
        text = io.TextIOWrapper(raw, encoding=_encoding(raw), newline="")
        try:
            yield text
        except UnicodeDecodeError:
            raise _wrong_byte(file) from None
        finally:
            text.detach()


def lines(file: File) -> Iterator[tuple[int, str]]:
    r"""Lines with their ends (\n, \r\n or \r alone), numbered from 1; raises SourceError as `open_text`."""
    with open_text(file) as text:
        yield from enumerate(text, start=1)


def _encoding(raw: "io.BufferedReader[Any]") -> str:
    start = raw.peek(4)[:4]
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _wrong_byte(file: File) -> SourceError:
    """The error of the first byte that is no text in the file's encoding."""
    offset, line = 0, 1
    with open_bytes(file) as raw:
        encoding = _encoding(raw)
        decoder = codecs.getincrementaldecoder(encoding)()
        ends = io.IncrementalNewlineDecoder(None, translate=True)
        while True:
            chunk = raw.read(CHUNK)
            try:
                line += ends.decode(decoder.decode(chunk, final=not chunk), final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(error.encoding, "replace")
                line += ends.decode(before, final=True).count("\n")
                offset += len(chunk) - len(error.object) + error.start
                name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
                what = f"not {name} (byte 0x{error.object[error.start]:02x} at offset {offset})"
                return SourceError(f"{file}, line {line}: {what}: convert the file to UTF-8", argument="path")
            if not chunk:
                return SourceError(f"{file} changed while it was read", argument="path")
            offset += len(chunk)
