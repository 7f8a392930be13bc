"""Hidden states of training queries at the compression tokens, of one pass whose parts stay on the disk.

Closed form, refinement and standardised reading are made of the same numbers. A part is keyed by all that decides
them: the backbone and its precision, the new tokens, the prompts. A run with another ridge, share, refinement or
teacher finds them in `.work/hidden`; `make clean-work` removes them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from pipeline.backbone.device import release_memory
from pipeline.core.code_digest import code_digest
from pipeline.core.errors import WorkError
from pipeline.core.files import bytes_sha256, digest_of
from pipeline.core.part_store import Parts
from pipeline.core.row_store import locked
from pipeline.core.run import is_out_of_memory, progress, work_dir
from pipeline.encoder.passes.plain import QueryPass
from pipeline.encoder.student import Student
from pipeline.optim.batching import dealt_passes, own_passes, parts
from pipeline.optim.late import HostCopy
from pipeline.train.data import TrainingRows

log = logging.getLogger(__name__)

# Rows of a part, by device: what a kill costs at most. Long enough that texts of like length meet.
PART_ROWS = {"cpu": 256, "cuda": 8192}
READ_TOKENS = 32_000
"""Tokens of queries that a GPU reads at a time: nothing is kept of them but keys and values."""
# Modules that decide a state with all they import: an edit there voids the kept ones.
CODE = ("pipeline.encoder.passes.select", "pipeline.train.states")


@dataclass(frozen=True)
class States:
    """What is kept of the hidden states of B rows at n compression tokens.

    Attributes:
        features: what embeddings are made of, `[B, d]`: the mean over the tokens, or what else is pooled.
        sums: over the rows, float64 `[n, d]`.
        squares: sum of all squares.
    """

    features: np.ndarray
    sums: np.ndarray
    squares: float

    @classmethod
    def of(cls, hidden: np.ndarray, tokens: int) -> Self:
        """Of states `[B, n, d]` at n `tokens`, or with a mean in front of them, `[B, 1 + n, d]`."""
        pooled = hidden.shape[1] - tokens
        features, at_tokens = (hidden[:, :pooled] if pooled else hidden).mean(axis=1), hidden[:, pooled:]
        return cls(features, at_tokens.sum(0, dtype=np.float64), float(np.square(at_tokens, dtype=np.float64).sum()))

    @classmethod
    def joined(cls, found: Sequence["States"]) -> Self:
        """The rows of several, in their order."""
        features = np.concatenate([each.features for each in found])
        sums = np.sum([each.sums for each in found], axis=0)
        return cls(features, sums, sum(each.squares for each in found))

    def to_bytes(self) -> bytes:
        sink = BytesIO()
        np.savez(sink, features=self.features, sums=self.sums, squares=self.squares)
        return sink.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as file:
            return cls(file["features"], file["sums"], float(file["squares"]))


@contextmanager
def kept_states(
    origin: Mapping[str, Any] | None, student: Student, adapter: Mapping[str, torch.Tensor], accelerator: Any
) -> Iterator[Parts | None]:
    """Where a process keeps its states; None without an `origin`, and where another run is at them, with a warning.

    `origin` is what pins the backbone and its precision, `adapter` LoRA's tensors.
    """
    trained = {"tokens": student.tokens, **adapter}
    conditions = {
        "origin": origin,
        "trained": {name: bytes_sha256(value.detach().cpu().numpy().tobytes()) for name, value in trained.items()},
        "read": student.compression_tokens,
        "device": accelerator.device.type,
        "share": [accelerator.process_index, accelerator.num_processes],
        "code": code_digest(CODE),
    }
    with ExitStack() as stack:
        kept = None
        if origin is not None:
            try:
                folder = stack.enter_context(locked(work_dir("hidden") / digest_of(conditions)[:16]))
                kept = Parts(folder, ".npz")
            except WorkError as error:
                log.warning("hidden states are not kept: %s", error)
        yield kept


@dataclass(frozen=True)
class RowPasses:
    """Query passes over training rows, which the processes share.

    Attributes:
        most_rows, most_tokens: of a forward pass; rows count where tokens are None.
        even: see `own_passes`; nothing is kept then, as all processes must run the same passes.
        kept: parts of this process that an earlier run has read, and where new ones are kept; None keeps none.
    """

    student: Student
    query_pass: QueryPass
    accelerator: Any
    most_rows: int
    most_tokens: int | None
    even: bool = False
    kept: Parts | None = None

    def read(self, rows: TrainingRows, chosen: Sequence[int] | np.ndarray) -> Iterator[tuple[list[int], States]]:
        """Numbers, places in `chosen`, and states of this process's rows, the longest rows of a part first."""
        lengths = rows.query_lengths(chosen) + len(self.student.tokens)
        halved = HalvedPasses(self.student, self.query_pass, may_halve=not self.even)
        processes = self.accelerator.num_processes
        size = PART_ROWS.get(self.accelerator.device.type, PART_ROWS["cuda"]) * processes
        padded = self.query_pass.padded
        limits: dict[str, Any] = {"most_rows": self.most_rows, "most_tokens": self.most_tokens, "padded": padded}
        starts = range(0, len(chosen), size)
        for place, start in enumerate(progress(starts, total=len(starts), desc="read queries", unit="part")):
            part = range(start, min(start + size, len(chosen)))
            shares = dealt_passes(part, lengths, processes, **limits)
            own = own_passes(shares, self.accelerator.process_index, even=self.even)
            numbers = [numbers for numbers, _ in own]
            source = rows.prompts([chosen[number] for number in chain(*numbers)])
            if (found := self._kept(place, source)) is not None:
                yield list(chain(*numbers)), found
                continue
            made = []
            read = halved(rows, [[chosen[number] for number in each] for each in numbers])
            for (each, weight), states in zip(own, read, strict=True):
                if weight:
                    made.append(states)
                    yield each, states
            self._keep(place, source, made)

    def _kept(self, place: int, source: Any) -> States | None:
        path = None if self.kept is None or self.even else self.kept.find(place, source)
        return None if path is None else States.from_file(path)

    def _keep(self, place: int, source: Any, made: Sequence[States]) -> None:
        finite = all(np.isfinite(states.features).all() for states in made)
        if made and finite and self.kept is not None and not self.even:
            self.kept.put(place, source, States.joined(made).to_bytes())


class HalvedPasses:
    """Query passes, which are halved from the first one on that does not fit into memory."""

    def __init__(self, student: Student, query_pass: QueryPass, *, may_halve: bool) -> None:
        self._student, self._query_pass, self._may_halve, self._parts = student, query_pass, may_halve, 1

    def __call__(self, rows: TrainingRows, passes: Sequence[Sequence[int]]) -> Iterator[States]:
        """The states of each pass over some rows; while the device reads one, the caller has the one before it."""
        before: HostCopy | None = None
        for some in passes:
            copy = self._read(rows, some)
            if before is not None:
                yield self._states(before)
            before = copy
        if before is not None:
            yield self._states(before)

    def _states(self, copy: HostCopy) -> States:
        return States.of(copy.wait().numpy(), self._student.compression_tokens)

    @torch.inference_mode()
    def _read(self, rows: TrainingRows, some: Sequence[int]) -> HostCopy:
        while (hidden := self._in_parts(rows, some)) is None:
            release_memory()
            self._parts *= 2
            log.info("memory is full, batches of queries are read in %d parts", self._parts)
        return HostCopy(hidden)

    def _in_parts(self, rows: TrainingRows, some: Sequence[int]) -> torch.Tensor | None:
        size = -(-len(some) // self._parts)
        tokens, count = self._student.tokens, self._student.compression_tokens
        try:
            queries = [rows.queries(part) for part in parts(some, size)]
            return torch.cat([self._query_pass(ids, tokens, count, pooled) for ids, pooled in queries])
        except Exception as error:
            if size == 1 or not (self._may_halve and is_out_of_memory(error)):
                raise
        return None
