"""A file of texts in, a file of embeddings out, of any size: `python -m pipeline encode`.

The texts are embedded in chunks of a fixed number of rows, each stored before the next begins: a killed run continues
after the last stored chunk, and the file has the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifacts import ArtifactWriter
from pipeline.core.errors import SourceError
from pipeline.core.part_store import Parts, open_parts, whole_file
from pipeline.core.readers import TextFile, check_not_read
from pipeline.core.run import progress
from pipeline.core.target_transform import Space
from pipeline.encoder.folder.config import fingerprint

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Embedded, Encoder

OUTPUTS = (".npy", ".parquet")
# Covers whatever changes an embedding, or how parts are kept.
VERSION = 2
# Texts of a part, by device: what a kill costs at most. Long enough that texts of like length meet.
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}
# Key of a Parquet file's metadata: which encoder, and which instruction.
EMBEDDED_BY = b"embedded_by"


class Encoded(NamedTuple):
    """Embeddings written, their dimensions, those that an earlier run had made, truncated texts among the others."""

    rows: int
    width: int
    kept: int
    truncated: int


def check_output(path: Path, source: Path) -> None:
    """Raises SourceError unless `path` has a format that `encode_file` knows, and is not the input."""
    if path.suffix not in OUTPUTS:
        raise SourceError(f"unknown format '{path.suffix}' (known: {', '.join(OUTPUTS)})", argument="output")
    check_not_read(path, source)


def made_by(encoder: "Encoder", instruction: str, space: Space = "trained") -> dict[str, Any]:
    """What decides an embedding besides its text, however its folder is called (serialises to JSON)."""
    decides = fingerprint(encoder.identity, encoder.config)
    facts = {"encoder": {key: value for key, value in decides.items() if key != "name"}, "instruction": instruction}
    return facts if space == "trained" else {**facts, "space": space, "transform": encoder.config.transform}


def not_made_by(encoder: "Encoder", path: Path, instruction: str | None = None) -> str | None:
    """Why a Parquet file does not hold embeddings that `encoder` makes in its trained space: the end of a sentence.

    None if it does; `instruction` None accepts any.
    """
    schema = pq.read_schema(path)
    written = (schema.metadata or {}).get(EMBEDDED_BY)
    if written is None or "embedding" not in schema.names:
        return "holds no embeddings that encode wrote"
    try:
        theirs = json.loads(written)
        another = theirs["encoder"] != made_by(encoder, "")["encoder"]
        otherwise = instruction is not None and theirs["instruction"] != instruction
        changed = theirs.get("transform") is not None
    except (ValueError, TypeError, KeyError):
        return "does not say what made its embeddings: its metadata is damaged"
    if another:
        return "holds embeddings by another encoder (other weights, or texts are read in another way)"
    if changed:
        return "holds embeddings in the teacher's space (encode --space teacher)"
    return "holds embeddings with another instruction" if otherwise else None


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

    `output` appears when it is complete and replaces a file there; `chunk_rows` None is `CHUNK_ROWS` of the device; see
    `Encoder.encode` for the other options.

    Raises:
        SourceError: an unknown output format, the output is the input, or the input is damaged or changes meanwhile.
        TrainingError: see `Encoder.encode`.
        WorkError: the disk is full, or another process does the same work.
    """
    check_output(output, texts.path)
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
    with open_parts("encode", conditions, ".npy") as opened:
        parts = _Embeddings(opened, width)
        embed = partial(encoder.embed, instruction=instruction, batch_tokens=batch_tokens, space=space)
        kept, truncated = _embed(embed, texts, parts, rows)
        with whole_file(output) as unfinished:
            if output.suffix == ".npy":
                _write_npy(unfinished, texts, parts, rows)
            else:
                _write_parquet(unfinished, texts, parts, rows, made_by(encoder, instruction, space))
    return Encoded(texts.rows, width, kept, truncated)


def _embed(
    embed: "Callable[[list[str]], Embedded]", texts: TextFile, parts: "_Embeddings", rows: int
) -> tuple[int, int]:
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


class _Embeddings:
    """Embeddings of chunks, in parts."""

    def __init__(self, parts: Parts, width: int) -> None:
        self._parts, self.width = parts, width

    def put(self, place: int, chunk: list[str], embeddings: "np.ndarray[Any, Any]") -> None:
        """Write the embeddings of a chunk, once they are all there."""
        import numpy as np

        sink = BytesIO()
        np.save(sink, np.ascontiguousarray(embeddings, dtype=np.float32))
        self._parts.put(place, chunk, sink.getvalue())

    def find(self, place: int, chunk: list[str]) -> "np.ndarray[Any, Any] | None":
        """The embeddings of a chunk, if they were written and are undamaged."""
        import numpy as np

        path = self._parts.find(place, chunk)
        return None if path is None else np.load(path, allow_pickle=False)

    def read(self, texts: TextFile, rows: int) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        """All chunks in order, with their embeddings.

        Raises:
            SourceError: the input has changed since they were made.
        """
        for place, chunk in enumerate(texts.chunks(rows)):
            embeddings = self.find(place, chunk)
            if embeddings is None or embeddings.shape != (len(chunk), self.width):
                raise SourceError(f"{texts.path} changed while it was embedded: run again", argument="path")
            yield chunk, embeddings


def _write_npy(path: Path, texts: TextFile, parts: _Embeddings, rows: int) -> None:
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
        raise SourceError(f"{texts.path} changed while it was embedded: run again", argument="path")


def _write_parquet(path: Path, texts: TextFile, parts: _Embeddings, rows: int, origin: dict[str, Any]) -> None:
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
