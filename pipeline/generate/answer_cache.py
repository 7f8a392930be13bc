"""The backbone's own answers to texts of an evaluation, each asked for once.

They come from the engine of section `generate` and stay in a store in the work folder, keyed by the prompt, so that no
later run, suite or probe asks for them again.
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core.artifacts import bytes_sha256
from pipeline.core.row_store import ShardStore
from pipeline.generate.engines.base import Completion, Engine, Prompt, Sampling
from pipeline.generate.generator import Generator, answer_content, make_generator
from pipeline.generate.outcomes import STORE
from pipeline.generate.params import GenerateParams

log = logging.getLogger(__name__)

WINDOW_ROWS = 4096  # prompts are tokenised, and sorted by length, within so many


class Answers:
    """Answers prompts; what the store lacks is generated.

    The engine starts at the first prompt that the store lacks and stays until `close`, or for that one call only where
    it must not keep its memory.

    Attributes:
        keeps_engine: whether it stays.
    """

    def __init__(
        self,
        open_store: Callable[[], ShardStore],
        make: Callable[[ShardStore], Generator],
        identity: Callable[[], Mapping[str, Any]],
        *,
        keeps_engine: bool = True,
    ) -> None:
        """Set what is called when answers are asked for.

        Args:
            open_store: opens the store (schema `outcomes.STORE`); it is closed after each call, and so is its lock.
            make: the Generator over a store, its engine not loaded yet.
            identity: gives what decides an answer besides its prompt.
            keeps_engine: see the class.
        """
        self._open_store, self._make, self._identity = open_store, make, identity
        self.keeps_engine = keeps_engine
        self._engine: Engine | None = None

    @classmethod
    def of(cls, backbone: BackboneParams, params: GenerateParams, work: Path, *, keeps_engine: bool = True) -> Self:
        """By the engine of the params, kept in stores below `work`."""

        @cache
        def identity() -> dict[str, Any]:
            return {"backbone": identify(backbone.name, backbone.revision), **answer_content(backbone, params)}

        return cls(
            lambda: ShardStore(work, STORE, identity()),
            lambda store: make_generator(backbone, params, store),
            identity,
            keeps_engine=keeps_engine,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The backbone and all that decides an answer to a prompt; serialises to JSON."""
        return dict(self._identity())

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """An answer to each prompt, None where the engine failed on it; such a prompt is asked again by the next call.

        Raises:
            BackboneError: the backbone cannot be used.
            EngineError: the engine broke, or more prompts failed than `generate.max_failed_fraction`.
            WorkError: the disk is full, or another process asks for the same backbone's answers.
        """
        ids = [answer_id(prompt) for prompt in prompts]
        texts = dict(zip(ids, prompts, strict=True))
        with self._open_store() as store:
            if any(row_id not in store for row_id in texts):
                self._generate(store, texts)
            rows = store.take([row_id for row_id in texts if row_id in store])
        found = dict(zip(rows["id"].to_pylist(), rows["response"].to_pylist(), strict=True))
        return [found.get(row_id) for row_id in ids]

    def close(self) -> None:
        """Stop the engine, if one runs, and free its memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _generate(self, store: ShardStore, texts: Mapping[str, str]) -> None:
        ids = pa.array(sorted(texts), pa.string())
        generator = self._make(store)
        load = generator.load_engine
        try:
            replace(generator, load_engine=lambda: self._kept(load)).run(ids, _windows(texts))
        finally:
            if not self.keeps_engine:
                self.close()

    def _kept(self, load: Callable[[], Engine]) -> Engine:
        if self._engine is None:
            _return_gpu_memory()
            self._engine = load()
        return _KeptEngine(self._engine)


class _KeptEngine:
    """An engine whose user cannot close it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`."""
        return self._engine.generate(prompts, sampling)

    def close(self) -> None:
        """The owner does that."""


def answer_id(prompt: str) -> str:
    """The id of a prompt's row: the hash of its text."""
    return bytes_sha256(prompt.encode())[:32]


def _windows(texts: Mapping[str, str]) -> Iterator[pa.Table]:
    table = pa.table({"id": list(texts), "text": list(texts.values())})
    for start in range(0, table.num_rows, WINDOW_ROWS):
        yield table.slice(start, WINDOW_ROWS)


def _return_gpu_memory() -> None:
    """Systems that are gone leave their memory with torch, where an engine in another process cannot have it."""
    if "torch" not in sys.modules:
        return
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
