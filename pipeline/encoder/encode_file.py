"""Files of texts in, a file of embeddings out, of any size: `python -m pipeline encode`.

The texts are embedded in chunks of a fixed number of rows, each stored before the next begins: a killed run continues
after the last stored chunk, and the file has the same bytes. Centring, truncation and quantisation happen when the file
is written: other ones of the same embeddings compute nothing twice after a kill.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipeline.core.artifacts import ArtifactWriter
from pipeline.core.errors import SourceError, nested_in
from pipeline.core.files import write_bytes
from pipeline.core.part_store import Parts, open_parts, whole_file
from pipeline.core.readers import Columns, TextFile, check_not_read, open_columns
from pipeline.core.run import progress
from pipeline.core.target_transform import Space
from pipeline.encoder.embedded_by import CORPUS, EMBEDDED_BY, center_facts, made_by, mean_of, read_center
from pipeline.encoder.storage import Storage, ranges_of

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Embedded, Encoder

OUTPUTS = (".npy", ".parquet")
# Covers whatever changes an embedding, or how parts are kept.
VERSION = 3
# Texts of a part, by device: what a kill costs at most. Long enough that texts of like length meet.
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}
ALL = "all"
AS_THEY_ARE = Storage()


class Encoded(NamedTuple):
    """Embeddings written, the values of each, those that an earlier run had made, truncated texts among the others."""

    rows: int
    width: int
    kept: int
    truncated: int


def check_output(path: Path, source: Path | None, *, keeps: bool = False) -> None:
    """Raises SourceError unless `path` has a format that `encode_file` knows, and is not (in) the input.

    `keeps`: it will hold columns of the input too.
    """
    if path.suffix not in OUTPUTS:
        raise SourceError(f"unknown format '{path.suffix}' (known: {', '.join(OUTPUTS)})", argument="output")
    if keeps and path.suffix != ".parquet":
        raise SourceError(f"{path} holds no columns: must end in .parquet", argument="output")
    check_not_read(path, source)


def kept_columns(texts: TextFile, keep: str) -> Columns:
    """The columns of the input that `--keep` names, with commas between them; "all": all but the texts.

    Raises SourceError if one is missing, or is called as one that is written anyway.
    """
    if texts.column is None:
        raise SourceError(f"{texts.files[0]}: a .txt file has no columns to keep", argument="keep")
    with nested_in(names={"column": "keep"}):
        if keep == ALL:
            found = open_columns(texts.files, without=[texts.column])
        else:
            names = dict.fromkeys(name.strip() for name in keep.split(",") if name.strip())
            found = open_columns(texts.files, [name for name in names if (name, texts.column) != ("text", "text")])
    taken = [name for name in ("text", "embedding") if name in found.schema.names]
    if taken:
        raise SourceError(f"'{taken[0]}' is a column that encode writes: name the others to keep", argument="keep")
    return found


def encode_file(
    encoder: "Encoder",
    texts: TextFile,
    output: Path,
    *,
    instruction: str = "",
    batch_tokens: int | None = None,
    chunk_rows: int | None = None,
    space: Space = "trained",
    kept: Columns | None = None,
    storage: Storage = AS_THEY_ARE,
    center: str | None = None,
) -> Encoded:
    """Embed all texts of a file; float32 [rows, width] as .npy, or .parquet with the columns `text` and `embedding`.

    `output` appears when it is complete and replaces a file there; `chunk_rows` None is `CHUNK_ROWS` of the device; see
    `Encoder.encode` for the other options. `kept` columns of the input stand before the text in Parquet. `center`
    "corpus" subtracts the mean embedding of these texts and stores it (in the metadata of a Parquet file, beside a .npy
    as `NAME.center.npy`); the path of what was so written subtracts that mean, as from queries.

    Raises:
        SourceError: an unknown output format, the output is the input, the ranges or the mean of other embeddings lie
            beside it, the input is damaged or changes meanwhile, `storage` has more dimensions than the embeddings, or
            `center` names no mean of this encoder's.
        TrainingError: see `Encoder.encode`.
        WorkError: the disk is full, or another process does the same work.
    """
    check_output(output, texts.path, keeps=kept is not None)
    width = encoder.width_of(space)
    storage.check(width)
    if output.suffix == ".npy":
        _check_beside(output, ranges=storage.quantize == "int8", center=center == CORPUS)
    given = None if center is None or center == CORPUS else read_center(encoder, Path(center), space)
    device = encoder.model.device.type
    rows = chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])
    conditions = {
        "version": VERSION,
        "made_by": made_by(encoder, instruction, space),
        "dtype": str(encoder.model.dtype),
        "device": device,
        "batch_tokens": batch_tokens,
        "chunk_rows": rows,
        "input": texts.identity,
        "column": texts.column,
    }
    with open_parts("encode", conditions, ".npy") as opened:
        parts = _Embeddings(opened, width)
        embed = partial(encoder.embed, instruction=instruction, batch_tokens=batch_tokens, space=space)
        reused, truncated = _embed(embed, texts, parts, rows)
        stored = _Stored(texts, parts, rows, storage, given, own=center == CORPUS)
        with whole_file(output) as unfinished:
            if output.suffix == ".npy":
                _write_npy(unfinished, stored)
                _write_beside(output, ranges=stored.ranges, center=stored.center if center == CORPUS else None)
            else:
                origin = made_by(encoder, instruction, space) | stored.facts()
                _write_parquet(unfinished, stored, origin, kept)
    return Encoded(texts.rows, stored.width, reused, truncated)


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
                raise _changed(texts)
            yield chunk, embeddings


def _changed(texts: TextFile) -> SourceError:
    return SourceError(f"{texts.path} changed while it was embedded: run again", argument="path")


class _Stored:
    """All embeddings as the file will hold them, in chunks."""

    def __init__(
        self,
        texts: TextFile,
        parts: _Embeddings,
        rows: int,
        storage: Storage,
        center: "np.ndarray[Any, Any] | None" = None,
        *,
        own: bool = False,
    ) -> None:
        """Read through the embeddings once if their `own` mean is to be subtracted, and once if ranges are needed."""
        self.texts, self.rows, self._parts, self._storage, self.center = texts, rows, parts, storage, center
        self.width, self.dtype = storage.values(parts.width), storage.dtype
        if own:
            self.center = mean_of(found for _, found in parts.read(texts, rows))
        self.ranges = ranges_of(found for _, found in self._floats()) if storage.quantize == "int8" else None

    def facts(self) -> dict[str, Any]:
        """What a reader of the file must know of centring and storage, if not as usual (serialises to JSON)."""
        center = {} if self.center is None else center_facts(self.center)
        if self._storage == AS_THEY_ARE:
            return center
        ranges = {} if self.ranges is None else {"ranges": self.ranges.tolist()}
        return {"storage": asdict(self._storage) | ranges} | center

    def chunks(self) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        """Texts, and their embeddings `[B, width]`; raises SourceError if the input has changed."""
        for chunk, found in self._floats():
            yield chunk, self._storage.quantized(found, self.ranges)

    def _floats(self) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
        count = 0
        for chunk, found in self._parts.read(self.texts, self.rows):
            yield chunk, self._storage.truncated(found if self.center is None else found - self.center)
            count += len(chunk)
        if count != self.texts.rows:
            raise _changed(self.texts)


def _write_npy(path: Path, stored: _Stored) -> None:
    import numpy as np

    with path.open("wb") as file:
        shape = (stored.texts.rows, stored.width)
        header = {"descr": stored.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        for _, embeddings in stored.chunks():
            file.write(embeddings.tobytes())


def _beside(output: Path, name: str) -> Path:
    return output.with_suffix(f".{name}.npy")


def _check_beside(output: Path, **written: bool) -> None:
    """Raises SourceError if a file that is not `written` anew lies where readers look for one of this output."""
    for name, anew in written.items():
        if not anew and (path := _beside(output, name)).exists():
            raise SourceError(f"{path} would stay beside {output}: remove it, or write elsewhere", argument="output")


def _write_beside(output: Path, **arrays: "np.ndarray[Any, Any] | None") -> None:
    """What a .npy of embeddings cannot hold: of int8 the ranges `[2, width]` of dimensions, the mean `[width]`."""
    import numpy as np

    written = {name: values for name, values in arrays.items() if values is not None}
    if written:
        # A kill in between leaves no embeddings, rather than those of an earlier run beside these ranges or this mean.
        output.unlink(missing_ok=True)
    for name, values in written.items():
        sink = BytesIO()
        np.save(sink, values)
        write_bytes(_beside(output, name), sink.getvalue())


def _write_parquet(path: Path, stored: _Stored, origin: dict[str, Any], kept: Columns | None) -> None:
    value = pa.from_numpy_dtype(stored.dtype)
    fields = [pa.field("text", pa.string()), pa.field("embedding", pa.list_(value, stored.width))]
    kept = kept if kept is not None and kept.schema.names else None
    others = [] if kept is None else list(kept.schema)
    schema = pa.schema([*others, *fields], {EMBEDDED_BY: json.dumps(origin, sort_keys=True).encode()})

    def tables() -> Iterator[pa.Table]:
        beside: Iterator[pa.Table | None] = repeat(None) if kept is None else kept.chunks(stored.rows)
        for chunk, embeddings in stored.chunks():
            columns = next(beside, None)
            if kept is not None and (columns is None or columns.num_rows != len(chunk)):
                raise _changed(stored.texts)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), stored.width)
            rest = [] if columns is None else columns.columns
            yield pa.Table.from_arrays([*rest, pa.array(chunk, pa.string()), vectors], schema=schema)

    ArtifactWriter(path.parent).write_stream(path.name, tables(), schema)
