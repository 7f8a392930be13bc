"""What a file of embeddings says of them: the encoder, the instruction, the storage, and a mean that was subtracted."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError
from pipeline.core.files import bytes_sha256
from pipeline.core.target_transform import Space
from pipeline.core.vectors import matrix
from pipeline.encoder.folder.config import fingerprint

if TYPE_CHECKING:
    from pipeline.encoder.inference import Encoder

# Key of a Parquet file's metadata.
EMBEDDED_BY = b"embedded_by"
# Stands for the mean embedding of the texts at hand, where a file would name another.
CORPUS = "corpus"

Array = np.ndarray[Any, Any]


def check_instruction(instruction: str) -> None:
    """Raises SourceError if an instruction holds half of a surrogate pair, which no tokenizer reads."""
    try:
        instruction.encode()
    except UnicodeEncodeError as error:
        half = f"{instruction[error.start]!r} at character {error.start}, half of a surrogate pair"
        raise SourceError(f"holds {half}: write it as UTF-8", argument="prompt") from None


def made_by(encoder: "Encoder", instruction: str, space: Space = "trained") -> dict[str, Any]:
    """What decides an embedding besides its text, however its folder is called (serialises to JSON).

    Raises SourceError as `check_instruction`.
    """
    check_instruction(instruction)
    decides = fingerprint(encoder.identity, encoder.config)
    facts = {"encoder": {key: value for key, value in decides.items() if key != "name"}, "instruction": instruction}
    return facts if space == "trained" else {**facts, "space": space, "transform": encoder.config.transform}


def not_made_by(
    encoder: "Encoder", path: Path, instruction: str | None = None, *, centered: bool = False
) -> str | None:
    """Why a Parquet file does not hold embeddings that `encoder` makes in its trained space: the end of a sentence.

    None if it does; `instruction` None accepts any, `centered` also those less a mean.
    """
    try:
        theirs = _said_of(path)
        if theirs is None:
            return "holds no embeddings that encode wrote"
        another = theirs["encoder"] != made_by(encoder, "")["encoder"]
        otherwise = instruction is not None and theirs["instruction"] != instruction
        changed = theirs.get("transform") is not None
        stored = theirs.get("storage")
        shifted = center_of(path) is not None and not centered
    except (ValueError, TypeError, KeyError, AttributeError):
        return "does not say what made its embeddings: its metadata is damaged"
    if another:
        return "holds embeddings by another encoder (other weights, or texts are read in another way)"
    if changed:
        return "holds embeddings in the teacher's space (encode --space teacher)"
    if stored is not None:
        return "holds embeddings that were truncated or quantised"
    if shifted:
        return "holds centred embeddings (encode --center)"
    return "holds embeddings with another instruction" if otherwise else None


def _said_of(path: Path) -> dict[str, Any] | None:
    """None if encode did not write the file; raises ValueError if what it says is damaged."""
    schema = pq.read_schema(path)
    written = (schema.metadata or {}).get(EMBEDDED_BY)
    if written is None or "embedding" not in schema.names:
        return None
    found: dict[str, Any] | None = json.loads(written)
    return found


def stored_in(path: Path, column: pa.Array | pa.ChunkedArray, width: int) -> Array:
    """Embeddings float32 `[B, width]` in a column of a file; SourceError if a row is no such embedding."""
    whole = not column.null_count and pc.all(pc.equal(pc.list_value_length(column), width)).as_py()
    found = matrix(column) if whole else None
    if found is None or not np.isfinite(found).all():
        message = f"{path}: a row of 'embedding' is not {width} finite numbers: write the file again with encode"
        raise SourceError(message, argument="corpus")
    return found


def mean_of(blocks: Iterable[Array]) -> Array:
    """The mean of rows in blocks `[B, width]`, one at least: float32 `[width]`."""
    total, rows = np.zeros(1), 0
    for block in blocks:
        total, rows = total + block.sum(axis=0, dtype=np.float64), rows + len(block)
    return (total / rows).astype(np.float32)


def center_facts(mean: Array) -> dict[str, Any]:
    """What a file says of a mean `[width]` that was subtracted (serialises to JSON)."""
    return {"center": {"mean": mean.tolist(), "sha256": bytes_sha256(mean.tobytes())}}


def center_of(path: Path) -> Array | None:
    """The mean float32 `[width]` that a Parquet file of `encode` lacks, None if it lacks none.

    Raises ValueError, TypeError or KeyError if its metadata is damaged.
    """
    said = (_said_of(path) or {}).get("center")
    if said is None:
        return None
    mean = np.array(said["mean"], np.float32)
    if bytes_sha256(mean.tobytes()) != said["sha256"]:
        raise ValueError("the mean is not the one that was written")
    return mean


def read_center(encoder: "Encoder", path: Path, space: Space = "trained") -> Array:
    """The mean float32 `[width]` that `encode --center corpus` subtracted: from its Parquet file, or NAME.center.npy.

    Raises SourceError: there is none, or it is of another encoder's embeddings.
    """
    try:
        mean = np.load(path, allow_pickle=False) if path.suffix == ".npy" else center_of(path)
        theirs = made_by(encoder, "", space) if path.suffix == ".npy" else _said_of(path)
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        raise _no_center(f"{path} cannot be read ({error})") from None
    if mean is None or theirs is None:
        raise _no_center(f"{path} holds no mean")
    if theirs.get("encoder") != made_by(encoder, "")["encoder"] or theirs.get("space", "trained") != space:
        raise _no_center(f"{path} holds the mean of embeddings by another encoder, or in another space")
    width = encoder.width_of(space)
    if mean.shape != (width,):
        raise _no_center(f"{path} holds numbers of shape {list(mean.shape)}, the mean has [{width}]")
    if mean.dtype.kind not in "fiu" or not np.isfinite(mean).all():
        raise _no_center(f"{path} holds what is no finite number")
    return np.asarray(mean, np.float32)


def _no_center(problem: str) -> SourceError:
    message = f"{problem}: give {CORPUS}, or a file that encode --center {CORPUS} wrote"
    return SourceError(message, argument="center")
