"""Systems whose every score is known by hand, and folders of local tasks small enough to score by hand."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.evaluate.system import System
from pipeline.tasks.instructions import Side
from tests.conftest import tiny_model

WORDS = ("apple", "bread", "cloud", "dough", "eagle", "fjord", "grape", "house")


@dataclass
class WordSystem:
    """Embeds a text as the one-hot vector of its first word, or of another word (`shift`) if it has a "?"."""

    name: str = "student"
    shift: int = 0
    version: int = 0
    prompting: str = "none"
    calls: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        return {"fake": self.name, "shift": self.shift, "version": self.version}

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return text

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        self.calls.append((instruction, list(texts)))
        rows = [(WORDS.index(text.split()[0]) + self.shift * ("?" in text)) % len(WORDS) for text in texts]
        return np.eye(len(WORDS), dtype=np.float32)[rows]


@dataclass
class VectorSystem:
    """Embeds a text as the vector that is given for it."""

    vectors: dict[str, Sequence[float]]
    name: str = "student"
    prompting: str = "none"

    @property
    def identity(self) -> dict[str, Any]:
        return {"fake": self.name}

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return text

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


class ModelTeacher:
    """A teacher with the weights of a tiny backbone that embeds texts by their length."""

    width = 5

    def __init__(self) -> None:
        self.identity, self.model = {"name": "tiny"}, tiny_model("qwen3", seed=1)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[1, len(text), len(text) ** 2, 0, 0] for text in texts], dtype=np.float32)


class LiveParameters:
    """Counts in each system's turn the models that are in memory and were not when this was made.

    Attributes:
        models: by system, parameters in memory as a multiple of a tiny backbone's, rounded; shared ones count once.
    """

    def __init__(self) -> None:
        self._before, self.models = self._parameters(), dict[str, int]()

    @contextmanager
    def turn(self, system: System) -> Iterator[System]:
        """For `Systems.wrap`."""
        before = {id(parameter) for parameter in self._before}
        alive = sum(parameter.numel() for parameter in self._parameters() if id(parameter) not in before)
        self.models[system.name] = round(alive / sum(part.numel() for part in tiny_model("qwen3").parameters()))
        yield system

    @staticmethod
    def _parameters() -> list[Any]:
        gc.collect()
        modules = [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)]
        return list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


class Named(WordSystem):
    """A system with the identity of a real one."""

    def __init__(self, name: str, identity: dict[str, Any], prompting: str = "none") -> None:
        super().__init__(name, prompting=prompting)
        self._identity = identity

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity


BACKBONE = {"name": "models/tiny-lm", "sha256": "b" * 64}
CONFIG = {"backbone": BACKBONE, "width": 8, "max_query_tokens": 64}
STUDENT = {"name": "encoder", "sha256": "c0ffee" * 10 + "c0ff", "config": CONFIG}


def write_folder(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> Path:
    """A local data set in JSON Lines: config -> split -> rows."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "", "A test.", ""]), encoding="utf-8")
    return folder


def retrieval_folder(folder: Path, extra: Sequence[str] = ()) -> Path:
    """One query a word, each with the one document of that word; `extra` documents are nobody's."""
    documents = [{"_id": f"d-{word}", "title": word, "text": "is a word"} for word in WORDS]
    documents += [{"_id": f"x-{index}", "title": "", "text": text} for index, text in enumerate(extra)]
    queries = [{"_id": f"q-{word}", "text": f"{word} what is it?"} for word in WORDS]
    judgements = [{"query-id": f"q-{word}", "corpus-id": f"d-{word}", "score": 1} for word in WORDS]
    return write_folder(
        folder, {"corpus": {"corpus": documents}, "queries": {"queries": queries}, "default": {"test": judgements}}
    )


def sts_folder(folder: Path) -> Path:
    """Pairs whose gold scores say whether the first words are equal."""
    pairs = [(first, second) for first in WORDS[:4] for second in WORDS[:4]]
    rows = [{"sentence1": f"{a} one", "sentence2": f"{b} two", "score": 5.0 * (a == b)} for a, b in pairs]
    return write_folder(folder, {"default": {"test": rows}})


def classification_folder(folder: Path) -> Path:
    """The label is the first word."""
    rows = [{"text": f"{word} text {index}", "label": word} for word in WORDS[:3] for index in range(8)]
    return write_folder(folder, {"default": {"train": rows, "test": rows}})
