"""The backbone's own answers to texts of an evaluation, by the engine of section `generate`.

A store in the work folder, keyed by the prompt, keeps them for later runs, suites and probes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipeline.backbone.device import release_memory
from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core.errors import section
from pipeline.core.files import bytes_sha256
from pipeline.core.row_store import ShardStore
from pipeline.generate.engines.base import Completion, Engine, Prompt, Sampling
from pipeline.generate.generator import Generator, answer_content, make_generator
from pipeline.generate.params import GenerateParams
from pipeline.generate.response_counts import STORE

log = logging.getLogger(__name__)

WINDOW_ROWS = 4096  # prompts that are tokenised and sorted by length together


class Answers:
    """Answers prompts from a store and generates the missing ones; the engine starts at the first of these.

    With `keeps_engine` it runs until `close`; otherwise it stops after each call, which frees its memory.
    """

    def __init__(
        self,
        open_store: Callable[[], ShardStore],
        make: Callable[[ShardStore], Generator],
        identity: Callable[[], Mapping[str, Any]],
        *,
        keeps_engine: bool = True,
    ) -> None:
        """Nothing is called before the first prompt.

        Args:
            open_store: opens the store (schema `response_counts.STORE`); each call closes it and releases its lock.
            make: the Generator over a store, its engine not loaded yet.
            identity: what decides an answer besides its prompt.
            keeps_engine: see the class.
        """
        self._open_store, self._make, self._identity = open_store, make, identity
        self.keeps_engine = keeps_engine
        self._engine: Engine | None = None

    @classmethod
    def of(cls, backbone: BackboneParams, params: GenerateParams, work: Path, *, keeps_engine: bool = True) -> Self:
        """Answers by the engine of the params, in stores below `work`."""

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
        """The backbone and all else that decides an answer besides its prompt; serialises to JSON."""
        return dict(self._identity())

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """An answer to each prompt, None where the engine failed; the next call tries a failed prompt again.

        Raises:
            BackboneError, EngineError: they cannot be used, or more than `max_failed_fraction` of the prompts failed.
            WorkError: the disk is full, or another process uses the store.
        """
        ids = [answer_id(prompt) for prompt in prompts]
        texts = dict(zip(ids, prompts, strict=True))
        with self._open_store() as store:
            if len(store.committed(texts)) < len(texts):
                self._generate(store, texts)
            rows = store.take(sorted(store.committed(texts)))
        found = dict(zip(rows["id"].to_pylist(), rows["response"].to_pylist(), strict=True))
        return [found.get(row_id) for row_id in ids]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _generate(self, store: ShardStore, texts: Mapping[str, str]) -> None:
        ids = pa.array(sorted(texts), pa.string())
        try:
            with section("generate"):
                generator = self._make(store)
                load = generator.load_engine
                generator = replace(generator, load_engine=lambda: self._shared(load), look=None, samples=1)
                generator.run(lambda: [ids], _windows(texts))
        finally:
            if not self.keeps_engine:
                self.close()

    def _shared(self, load: Callable[[], Engine]) -> Engine:
        if self._engine is None:
            release_memory()
            self._engine = load()
        return _SharedEngine(self._engine)


class _SharedEngine:
    """An engine whose user does not close it: `Answers` does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        return self._engine.generate(prompts, sampling)

    def close(self) -> None:
        """Leave the engine to `Answers`."""


def answer_id(prompt: str) -> str:
    """The store's id of a prompt: 32 hex characters of its sha256."""
    return bytes_sha256(prompt.encode())[:32]


def _windows(texts: Mapping[str, str]) -> Iterator[pa.Table]:
    table = pa.table({"id": list(texts), "text": list(texts.values())})
    for start in range(0, table.num_rows, WINDOW_ROWS):
        yield table.slice(start, WINDOW_ROWS)
