"""A file of texts in, a file of embeddings out, of any size: `python -m pipeline encode`.

The texts are embedded in chunks of a fixed number of rows, each of which lies on the disk before the next one begins. A
part carries in its name its place, a hash of its texts and one of its own bytes: after a kill the same command goes on
behind the last finished chunk, and since a chunk is always the same texts, the file comes out in the same bytes.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipeline.artifacts import ArtifactWriter, bytes_sha256, digest_of, disk_errors, fsync_path, write_bytes
from pipeline.errors import SourceError
from pipeline.runtime import progress, work_dir
from pipeline.shards import lock_folder
from pipeline.target_transform import Space
from pipeline.text_files import TextFile

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Embedded, Encoder

log = logging.getLogger(__name__)

OUTPUTS = (".npy", ".parquet")
# Covers whatever changes an embedding, or how parts are kept.
VERSION = 1
# Texts of a part, by device: what a kill costs at most. Long enough that texts of like length meet.
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}
# Key of a Parquet file's metadata: which encoder, and which instruction.
EMBEDDED_BY = b"embedded_by"


class Encoded(NamedTuple):
    """What became of a file.

    Attributes:
        rows: embeddings written.
        width: their dimensions.
        kept: how many of them an earlier run had made.
        truncated: how many of the others are of texts that were cut to fit.
    """

    rows: int
    width: int
    kept: int
    truncated: int


def check_output(path: Path) -> None:
    """Raises SourceError unless the name says a format that `encode_file` knows."""
    if path.suffix not in OUTPUTS:
        raise SourceError(f"--output: unknown format '{path.suffix}' (known: {', '.join(OUTPUTS)})")


def made_by(encoder: "Encoder", instruction: str, space: Space = "trained") -> dict[str, Any]:
    """What decides an embedding besides its text, however its folder is called (serialises to JSON)."""
    weights = {key: value for key, value in encoder.identity.items() if key != "name"}
    facts = {"encoder": weights, "backbone": encoder.config.backbone, "instruction": instruction}
    return facts if space == "trained" else {**facts, "space": space, "transform": encoder.config.transform}


def encode_file(
    encoder: "Encoder",
    texts: TextFile,
    output: Path,
    *,
    instruction: str = "",
    batch_tokens: int | None = None,
    chunk_rows: int | None = None,
    space: Space = "trained",
) -> Encoded:
    """Embed all texts of a file; float32 [rows, width] as .npy, or .parquet with the columns `text` and `embedding`.

    Args:
        encoder: embeds.
        texts: the file.
        output: appears when it is complete; a file there is replaced.
        instruction: see `Encoder.encode`.
        batch_tokens: see `Encoder.encode`.
        chunk_rows: texts of a part; None: `CHUNK_ROWS` of the device.
        space: see `Encoder.encode`.

    Raises:
        SourceError: an unknown output format, or the input is damaged or changes meanwhile.
        TrainingError: see `Encoder.encode`.
        WorkError: the disk is full, or another process is at the same work.
    """
    check_output(output)
    width = encoder.width_of(space)
    device = encoder.model.device.type
    rows = chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])
    conditions = {
        "version": VERSION,
        "made_by": made_by(encoder, instruction, space),
        "dtype": str(encoder.model.dtype),
        "device": device,
        "batch_tokens": batch_tokens,
        "chunk_rows": rows,
        "input": str(texts.path.resolve()),
        "column": texts.column,
    }
    folder = work_dir("encode") / digest_of(conditions)[:16]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        parts = _Parts(folder, width)
        embed = partial(encoder.embed, instruction=instruction, batch_tokens=batch_tokens, space=space)
        kept, truncated = _embed(embed, texts, parts, rows)
        with _whole(output) as unfinished:
            if output.suffix == ".npy":
                _write_npy(unfinished, texts, parts, rows)
            else:
                _write_parquet(unfinished, texts, parts, rows, made_by(encoder, instruction, space))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return Encoded(texts.rows, width, kept, truncated)


def _embed(embed: "Callable[[list[str]], Embedded]", texts: TextFile, parts: "_Parts", rows: int) -> tuple[int, int]:
    """Make the parts that are missing; how many texts were embedded before, and how many of the others were cut."""
    kept = truncated = 0
    nothing: list[str] = []
    with progress(nothing, total=texts.rows, desc="encode", unit="text") as bar:
        for place, chunk in enumerate(texts.chunks(rows)):
            if parts.find(place, chunk) is not None:
                kept += len(chunk)
                bar.initial += len(chunk)
                bar.n += len(chunk)
            else:
                found = embed(chunk)
                parts.put(place, chunk, found.vectors)
                truncated += found.truncated
                bar.update(len(chunk))
        bar.refresh()
    return kept, truncated


class _Parts:
    """Embeddings of chunks in a folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self.width = folder, width
        for leftover in folder.glob(".*.npy.*"):
            leftover.unlink()
        self._paths = {path.stem.rpartition("-")[0]: path for path in folder.glob("*.npy")}

    def put(self, place: int, chunk: list[str], embeddings: "np.ndarray[Any, Any]") -> None:
        """Write the embeddings of a chunk, once they are all there."""
        import numpy as np

        sink = BytesIO()
        np.save(sink, np.ascontiguousarray(embeddings, dtype=np.float32))
        content = sink.getvalue()
        key = _key(place, chunk)
        self._paths[key] = self._folder / f"{key}-{bytes_sha256(content)[:16]}.npy"
        write_bytes(self._paths[key], content)

    def find(self, place: int, chunk: list[str]) -> "np.ndarray[Any, Any] | None":
        """The embeddings of a chunk, if they were written and are undamaged."""
        import numpy as np

        key = _key(place, chunk)
        if (path := self._paths.get(key)) is None:
            return None
        content = path.read_bytes()
        if bytes_sha256(content)[:16] == path.stem.rpartition("-")[2]:
            return np.load(BytesIO(content), allow_pickle=False)
        log.warning("%s is damaged (torn write or changed bytes): its rows are computed again", path)
        self._paths.pop(key).unlink()
        return None

    def read(self, texts: TextFile, rows: int) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        """All chunks in order, with their embeddings.

        Raises:
            SourceError: the input has changed since they were made.
        """
        for place, chunk in enumerate(texts.chunks(rows)):
            embeddings = self.find(place, chunk)
            if embeddings is None or embeddings.shape != (len(chunk), self.width):
                raise SourceError(f"{texts.option}: {texts.path} changed while it was embedded: run again")
            yield chunk, embeddings


def _key(place: int, chunk: list[str]) -> str:
    return f"{place:08d}-{digest_of(chunk)[:16]}"


def _write_npy(path: Path, texts: TextFile, parts: _Parts, rows: int) -> None:
    import numpy as np

    with path.open("wb") as file:
        written = 0
        for _, embeddings in parts.read(texts, rows):
            if not written:
                shape = (texts.rows, embeddings.shape[1])
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
            file.write(embeddings.astype("<f4", copy=False).tobytes())
            written += len(embeddings)
    if written != texts.rows:
        raise SourceError(f"{texts.option}: {texts.path} changed while it was embedded: run again")


def _write_parquet(path: Path, texts: TextFile, parts: _Parts, rows: int, origin: dict[str, Any]) -> None:
    width = parts.width
    fields = [pa.field("text", pa.string()), pa.field("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, {EMBEDDED_BY: json.dumps(origin, sort_keys=True).encode()})
    tables = (
        pa.Table.from_arrays(
            [pa.array(chunk, pa.string()), pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width)],
            schema=schema,
        )
        for chunk, embeddings in parts.read(texts, rows)
    )
    ArtifactWriter(path.parent).write_stream(path.name, tables, schema)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when all is written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            fsync_path(unfinished)
            unfinished.replace(path)
            fsync_path(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
