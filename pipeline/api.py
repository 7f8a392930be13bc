"""A trained encoder in Python: `from pipeline import load, similarity`.

    embedder = load("models/encoder")
    query = embedder.encode_query("Why is the sky blue?")
    passages = embedder.encode_document(["Air scatters blue light.", "Bread is baked in an oven."])
    similarity(query, passages)  # [1, 2]
    embedder.decode("Why is the sky blue?")

A mistake of the caller raises a `pipeline.core.errors.PipelineError` whose message says what to change.
Several processes (`processes=`) are started by `spawn`: a script that uses them needs `if __name__ == "__main__":`.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

from pipeline.backbone.device import best_device, check_device
from pipeline.backbone.loading import DType, dtype_name
from pipeline.core.errors import SourceError
from pipeline.core.vectors import unit_rows
from pipeline.parallel.devices import Count

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.core.target_transform import Space
    from pipeline.encoder.inference import Embedded
    from pipeline.encoder.pool import ParallelEncoder
    from pipeline.tasks.instructions import Side

# Fewer texts need no progress bar.
LONG_WORK = 256


class Options(TypedDict, total=False):
    """Options of `encode` that `encode_query` and `encode_document` share."""

    normalize: bool
    batch_tokens: int | None
    show_progress: bool | None
    processes: Count
    space: "Space"
    truncate_dim: int | None


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: "DType | torch.dtype" = "float32",
    backbone: str | Path | None = None,
    allow_other_backbone: bool = False,
    trust_remote_code: bool = False,
) -> "Embedder":
    """Read an encoder folder, as train writes it.

    Args:
        path: the folder, or a model of the hub, `ORG/NAME`.
        revision: commit, branch or tag of a model of the hub.
        device: of the backbone ("cpu", "cuda", "cuda:1"); None: the best that there is.
        dtype: of the backbone: float32, bfloat16 or float16, as a string or of torch. Embeddings are float32 always.
        backbone: folder or hub name of the backbone, in place of the recorded one.
        allow_other_backbone: accept a backbone with other weights, with a warning: its embeddings mean little.
        trust_remote_code: let the backbone run code that comes with it.

    Raises:
        TrainingError: the folder is no encoder or damaged, or the backbone is another than it was trained on. If that
            one came from the hub, a plain folder cannot be checked: it is used with a warning.
        BackboneError: the backbone cannot be loaded, or not on this device or in this dtype.
    """
    from pipeline.encoder.folder.locate import encoder_folder

    if device is not None:
        check_device(str(device))
    return Embedder(
        encoder_folder(path, revision),
        device=None if device is None else str(device),
        dtype=dtype_name(dtype),
        backbone=None if backbone is None else str(backbone),
        allow_other_backbone=allow_other_backbone,
        trust_remote_code=trust_remote_code,
    )


class Embedder:
    """A loaded encoder; `load` makes one. A context manager, which stops the processes that `processes` started.

    `encoder` gives soft prompts, hidden states and the backbone itself.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        from pipeline.encoder.folder.read import read_encoder
        from pipeline.encoder.inference import Encoder

        self._path, self._options = path, options
        self.encoder: Encoder = read_encoder(path, **{**options, "device": options["device"] or best_device()})
        self._workers: tuple[int, ParallelEncoder] | None = None

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return self.encoder.width

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens, prompt and template included; longer texts are cut, with a warning."""
        return self.encoder.max_tokens

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str = "",
        normalize: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        processes: Count = 1,
        space: "Space" = "trained",
        truncate_dim: int | None = None,
    ) -> "np.ndarray[Any, Any]":
        """Embeddings, float32: `[width]` of a string, `[N, width]` of a list, tuple, array or column of N strings.

        Args:
            texts: one string or several; for an iterator see `encode_stream`.
            prompt: instruction put before each text, e.g. "Generate a passage that best answers this question:".
            normalize: to unit length.
            batch_tokens: tokens in one forward pass; None: by the device.
            show_progress: a bar; None: for long work on a terminal.
            processes: that share the texts, each with the backbone; "auto": one for each visible GPU, one on a CPU.
                They are kept for the next call until `close`.
            space: "teacher" leads back to the space of the teacher's vectors before the transform of the targets.
            truncate_dim: dimensions to keep, the first ones; None: all. Rotated embeddings lose least (`rotate`).

        Raises:
            SourceError: an item is not a text, the space is unknown, or there are fewer dimensions.
            TrainingError: an embedding is not finite in this dtype, or the transform is missing.
            EvaluationError: a process died.
        """
        from pipeline.encoder.inference import check_texts

        several = [texts] if isinstance(texts, str) else _listed(texts)
        _check_truncation(truncate_dim, self.encoder.width_of(space))
        check_texts(several)
        bar = sys.stderr.isatty() and len(several) >= LONG_WORK if show_progress is None else show_progress
        count = self._process_count(processes)
        found = self._embed(count, several, instruction=prompt, batch_tokens=batch_tokens, show_progress=bar)
        self.encoder.config.warn_of_truncated(found.truncated, len(several))
        vectors = self.encoder.in_space(space, found.vectors)[:, :truncate_dim]
        vectors = unit_rows(vectors) if normalize else vectors
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        chunk: int | None = None,
        prompt: str = "",
        normalize: bool = False,
        batch_tokens: int | None = None,
        processes: Count = 1,
        space: "Space" = "trained",
        truncate_dim: int | None = None,
    ) -> "Iterator[np.ndarray[Any, Any]]":
        """Embeddings float32 `[<= chunk, width]`, in order, as they are made; at most one chunk is in memory.

        `texts` is any iterable with an order, endless ones too; `chunk` None is chosen by the device; see `encode` for
        the others.

        Raises:
            SourceError: an item is not a text, `chunk` is below 1, the space is unknown, or there are fewer dimensions.
        """
        from pipeline.encoder.encode_file import CHUNK_ROWS

        size = CHUNK_ROWS.get(self.encoder.model.device.type, CHUNK_ROWS["cuda"]) if chunk is None else chunk
        if not _is_whole(size) or size < 1:
            raise SourceError(f"chunk is {size}: it must be a whole number, at least 1")
        _refuse_table(texts)
        if isinstance(texts, str | bytes | Mapping | set | frozenset) or not isinstance(texts, Iterable):
            raise SourceError(f"texts is {str(texts)[:40]!r} ({type(texts).__name__}): give an iterable of strings")
        _check_truncation(truncate_dim, self.encoder.width_of(space))
        options = {"instruction": prompt, "batch_tokens": batch_tokens}
        return self._stream(iter(texts), size, normalize, processes, space, truncate_dim, **options)

    def _stream(
        self,
        texts: Iterator[str],
        size: int,
        normalize: bool,
        processes: Count,
        space: "Space",
        truncate_dim: int | None,
        **options: Any,
    ) -> "Iterator[np.ndarray[Any, Any]]":
        from pipeline.encoder.inference import check_texts

        count, total, truncated = self._process_count(processes), 0, 0
        try:
            while some := list(islice(texts, size)):
                check_texts(some, first=total)
                found = self._embed(count, some, **options)
                total, truncated = total + len(some), truncated + found.truncated
                vectors = self.encoder.in_space(space, found.vectors)[:, :truncate_dim]
                yield unit_rows(vectors) if normalize else vectors
        finally:
            self.encoder.config.warn_of_truncated(truncated, total)

    def _embed(self, count: int, texts: list[str], **options: Any) -> "Embedded":
        if count == 1:
            return self.encoder.embed(texts, **options)
        try:
            return self._started(count).embed(texts, **options)
        except Exception:
            # A failed process stays failed: the next call starts new ones.
            self.close()
            raise

    def encode_query(self, texts: str | Iterable[str], **options: Unpack[Options]) -> "np.ndarray[Any, Any]":
        """`encode` with the query instruction of the retrieval evaluation."""
        return self.encode(texts, prompt=_instruction("query"), **options)

    def encode_document(self, texts: str | Iterable[str], **options: Unpack[Options]) -> "np.ndarray[Any, Any]":
        """`encode` with the document instruction of the retrieval evaluation."""
        return self.encode(texts, prompt=_instruction("document"), **options)

    @overload
    def decode(  # type: ignore[overload-overlap]  # a string is an iterable of strings too
        self, texts: str, max_new_tokens: int = 64, *, prompt: str = ""
    ) -> str: ...
    @overload
    def decode(self, texts: Iterable[str], max_new_tokens: int = 64, *, prompt: str = "") -> list[str]: ...
    def decode(self, texts: str | Iterable[str], max_new_tokens: int = 64, *, prompt: str = "") -> str | list[str]:
        """The answers that the embeddings of texts hold, written by the backbone; a string for a string."""
        from pipeline import lens

        if max_new_tokens < 1:
            raise SourceError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        several = [texts] if isinstance(texts, str) else _listed(texts)
        answers = lens.decode(self.encoder, several, max_new_tokens=max_new_tokens, instruction=prompt)
        return answers[0] if isinstance(texts, str) else answers

    def close(self) -> None:
        """Stop the processes of earlier calls with `processes`."""
        if self._workers is not None:
            self._workers[1].close()
            self._workers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self, count: int) -> "ParallelEncoder":
        """`count` processes; those of the last call if it had as many."""
        from pipeline.encoder.pool import ParallelEncoder, encoder_loader
        from pipeline.parallel.devices import split_devices

        if self._workers is None or self._workers[0] != count:
            self.close()
            # Each process sees its own GPU only, whatever number it has here.
            device = "cpu" if self._on_cpu else None
            loader = encoder_loader(self._path, **{**self._options, "device": device})
            self._workers = count, ParallelEncoder(loader, split_devices(count, on_cpu=self._on_cpu))
        return self._workers[1]

    def _process_count(self, processes: Count) -> int:
        from pipeline.core.errors import EvaluationError
        from pipeline.parallel.devices import worker_count

        if processes == 1:
            return 1
        if processes != "auto" and (not isinstance(processes, int) or processes < 1):
            raise SourceError(f"processes is {processes!r}: it must be a number from 1, or 'auto'")
        return worker_count(processes, gpus_each=1, error=EvaluationError, on_cpu=self._on_cpu)

    @property
    def _on_cpu(self) -> bool:
        return self.encoder.model.device.type == "cpu"


def similarity(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Cosines float32 `[N, M]` of embeddings `[N, width]` and `[M, width]`; one `[width]` counts as `[1, width]`.

    Raises:
        SourceError: the widths differ, or one is no array of numbers.
    """
    import numpy as np

    try:
        rows, columns = (np.atleast_2d(np.asarray(side, dtype=np.float32)) for side in (a, b))
    except (ValueError, TypeError) as error:
        raise SourceError(f"embeddings must be numbers [number, width]: {error}") from None
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise SourceError(
            f"embeddings of shapes {list(rows.shape)} and {list(columns.shape)} cannot be compared: both must be "
            "[number, width], of one encoder"
        )
    return unit_rows(rows) @ unit_rows(columns).T


def _listed(texts: Iterable[str]) -> list[str]:
    """Texts of an ordered collection of known length; SourceError for anything else."""
    kind = type(texts).__name__
    _refuse_table(texts)
    if isinstance(texts, Mapping | Set | bytes) or not isinstance(texts, Iterable):
        raise SourceError(f"texts is a {kind}: give a string, or a list, tuple, array or column of strings")
    if not hasattr(texts, "__len__") or getattr(texts, "shape", None) == ():
        raise SourceError(f"texts is a {kind}, whose length is not known: give a list, or use encode_stream")
    return list(texts)


def _check_truncation(truncate_dim: int | None, width: int) -> None:
    """Raises SourceError unless embeddings of `width` can be cut to `truncate_dim` dimensions."""
    from pipeline.encoder.storage import Storage

    if truncate_dim is not None and not _is_whole(truncate_dim):
        raise SourceError(f"truncate_dim is {truncate_dim!r}: it must be a whole number")
    Storage(truncate_dim).check(width)


def _is_whole(value: Any) -> bool:
    """Whether a number is whole, of numpy too."""
    return isinstance(value, Integral)


def _refuse_table(texts: object) -> None:
    """Raises SourceError for a data frame, which would iterate over columns or their names."""
    if hasattr(texts, "columns"):
        raise SourceError(f"texts is a {type(texts).__name__}: give a column of it, which holds the texts")


def _instruction(side: "Side") -> str:
    from pipeline.tasks.instructions import load_instructions

    return load_instructions().choose("", "Retrieval", side)
