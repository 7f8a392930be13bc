"""The cache gives what the system gave, asks it for each text once, and never mixes two systems."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.backbone.prompting import join_instruction
from pipeline.core.errors import EvaluationError, WorkError
from pipeline.core.row_store import ShardStore
from pipeline.evaluate import embedding_cache
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.system import revision_of
from pipeline.tasks.instructions import Side
from tests.conftest import ROOT


@dataclass
class LengthSystem:
    """Embeds what it reads as its length over 3, its first letter and `scale`; counts what it is asked for."""

    name: str = "student"
    prompting: str = "instruction"
    scale: float = 1.0
    asked: list[list[str]] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        return {"sha256": f"scale {self.scale}"}

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return join_instruction(instruction, text) if self.prompting == "instruction" else text

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        self.asked.append(list(texts))
        read = [self.cache_key(text, instruction, side) for text in texts]
        rows = [[len(text) / 3, float(ord(text[0])) if text[0] != "!" else np.nan, self.scale] for text in read]
        return np.array(rows, dtype=np.float32).reshape(len(texts), 3)


TEXTS = ["b two", "a", "b two", "c three words", "a"]


def encode(root: Path, system: LengthSystem, texts: Sequence[str], instruction: str = "", **conditions: Any) -> Any:
    """The embeddings that a cache gives, checked against the system's own, and the texts that it asked for."""
    system.asked.clear()
    with closing(CachedSystem(system, root, **conditions)) as cached:
        found = cached.encode(texts, instruction)
    asked = [text for call in system.asked for text in call]
    np.testing.assert_array_equal(found, system.encode(texts, instruction))
    assert found.dtype == np.float32
    return asked


def test_each_text_is_embedded_once(tmp_path: Path) -> None:
    assert sorted(encode(tmp_path, LengthSystem(), TEXTS)) == ["a", "b two", "c three words"]
    assert encode(tmp_path, LengthSystem(), TEXTS[::-1]) == []
    assert encode(tmp_path, LengthSystem(), [*TEXTS, "new"]) == ["new"]


def test_in_one_session_and_without_texts(tmp_path: Path) -> None:
    system = LengthSystem()
    with closing(CachedSystem(system, tmp_path)) as cached:
        first = cached.encode(TEXTS, "")
        np.testing.assert_array_equal(cached.encode(TEXTS, ""), first)
        assert (cached.computed, cached.reused, len(system.asked)) == (3, 3, 1)
        assert cached.encode([], "").shape == (0, 3)
        cached.close()
        np.testing.assert_array_equal(cached.encode(TEXTS, ""), first)
    assert (cached.name, cached.identity, cached.prompting) == (system.name, system.identity, system.prompting)
    assert cached.cache_key("a", "Say:", "query") == "Say: a"


def test_what_is_read_decides(tmp_path: Path) -> None:
    """An instruction that is read makes another text of it; one that is not read does not."""
    assert encode(tmp_path, LengthSystem(), ["a"], "Say:") == ["a"]
    assert encode(tmp_path, LengthSystem(), ["a"], "Ask:") == ["a"]
    assert encode(tmp_path, LengthSystem(), ["Say: a", "a"]) == ["a"]
    bare = LengthSystem(prompting="bare")
    assert encode(tmp_path, bare, ["a", "b"], "Say:") == ["a", "b"]
    assert encode(tmp_path, bare, ["a", "c", "b"], "Ask:") == ["c"]
    assert encode(tmp_path, bare, ["c", "a", "b"], "") == []


@pytest.mark.parametrize(
    "other",
    [
        (LengthSystem(scale=2.0), {"dtype": "float32"}),
        (LengthSystem(prompting="bare"), {"dtype": "float32"}),
        (LengthSystem(), {"dtype": "bfloat16"}),
    ],
    ids=["weights", "prompting", "dtype"],
)
def test_systems_never_share(tmp_path: Path, other: tuple[LengthSystem, dict[str, str]]) -> None:
    assert len(encode(tmp_path, LengthSystem(), TEXTS, dtype="float32")) == 3
    assert len(encode(tmp_path, other[0], TEXTS, **other[1])) == 3
    assert encode(tmp_path, LengthSystem(), TEXTS, dtype="float32") == []


def test_a_changed_version_reads_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path, LengthSystem(), TEXTS)
    monkeypatch.setattr(embedding_cache, "VERSION", 10**6)
    assert len(encode(tmp_path, LengthSystem(), TEXTS)) == 3


def test_what_is_not_finite_is_given_and_not_kept(tmp_path: Path) -> None:
    assert encode(tmp_path, LengthSystem(), ["!", "a"]) == ["!", "a"]
    assert encode(tmp_path, LengthSystem(), ["!", "a"]) == ["!"]


def test_what_a_system_failed_on_is_given_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(LengthSystem):
        failed = 0

        def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
            self.failed += "a" in texts
            return super().encode(texts, instruction, side)

    monkeypatch.setattr(embedding_cache, "CHUNK_TEXTS", 1)
    assert len(encode(tmp_path, Failing(), TEXTS)) == 3
    assert encode(tmp_path, LengthSystem(), TEXTS) == ["a"]


def test_chunks_are_of_like_lengths_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "CHUNK_TEXTS", 3)
    monkeypatch.setattr(embedding_cache, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(embedding_cache, "TAKE_ROWS", 2)
    texts = ["x" * length for length in (5, 99, 1, 3, 60, 30, 11)]
    system = LengthSystem()
    with closing(CachedSystem(system, tmp_path)) as cached:
        cached.encode(texts, "")
    assert [[len(text) for text in call] for call in system.asked] == [[99], [60, 30], [11, 5, 3], [1]]
    assert encode(tmp_path, LengthSystem(), texts) == []


def test_a_store_in_use_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(CachedSystem(LengthSystem(), tmp_path)) as holder:
        holder.encode(TEXTS, "")
        with caplog.at_level(logging.WARNING):
            system = LengthSystem()
            with closing(CachedSystem(system, tmp_path)) as second:
                for _ in range(2):
                    np.testing.assert_array_equal(second.encode(TEXTS, ""), holder.encode(TEXTS, ""))
    assert len(system.asked) == 2
    [warning] = caplog.messages
    assert warning.startswith("student embeds without its cache: ")
    assert f"in use by another process (pid {os.getpid()})" in warning


def test_a_full_disk_is_no_store_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise WorkError("no space")

    monkeypatch.setattr("pipeline.core.row_store.write_json", full)
    system = LengthSystem()
    with closing(CachedSystem(system, tmp_path)) as cached, pytest.raises(WorkError, match="no space"):
        cached.encode(TEXTS, "")
    assert not system.asked


def test_a_score_is_made_of_what_is_kept(tmp_path: Path) -> None:
    """Thirds are no float16: computed now or read from disk, they come rounded."""
    exact = LengthSystem().encode(TEXTS, "")
    rounded = exact.astype(np.float16).astype(np.float32)
    assert (rounded != exact).any()
    system = LengthSystem()
    for computed in (3, 0):
        with closing(CachedSystem(system, tmp_path, embeddings_dtype="float16")) as cached:
            np.testing.assert_array_equal(cached.encode(TEXTS, ""), rounded)
            assert cached.computed == computed
            assert revision_of(cached) != revision_of(system)
    assert len(encode(tmp_path, LengthSystem(), TEXTS)) == 3  # of float32 nothing is kept yet
    with closing(CachedSystem(LengthSystem(), tmp_path)) as cached:
        assert revision_of(cached) == revision_of(system)


def test_without_a_folder_nothing_is_kept_and_all_is_rounded(tmp_path: Path) -> None:
    system = LengthSystem()
    for _ in range(2):
        with closing(CachedSystem(system, None, embeddings_dtype="float16")) as cached:
            found = cached.encode(TEXTS, "")
    np.testing.assert_array_equal(found, system.encode(TEXTS, "").astype(np.float16).astype(np.float32))
    assert len(system.asked) == 3


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = LengthSystem(scale=65536.0)
    message = r"student gave 65536, float16 holds up to 65504: set embeddings_dtype to float32"
    with closing(CachedSystem(large, tmp_path, embeddings_dtype="float16")) as cached:
        with pytest.raises(EvaluationError, match=message):
            cached.encode(TEXTS, "")
        with pytest.raises(EvaluationError, match=message):
            cached.encode(["!"], "")  # beside a value that is no number
    assert len(encode(tmp_path, large, TEXTS)) == 3


class BrokenSystem(LengthSystem):
    """Forgets a text."""

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        return super().encode(texts, instruction, side)[1:]


def test_a_system_that_forgets_a_text(tmp_path: Path) -> None:
    message = r"student gave an array \(2, 3\), must be \(3, 3\)"
    with pytest.raises(EvaluationError, match=message), closing(CachedSystem(BrokenSystem(), tmp_path)) as cached:
        cached.encode(TEXTS, "")
    assert len(encode(tmp_path, LengthSystem(), TEXTS)) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.evaluate import embedding_cache
from tests.evaluate.test_embedding_cache import LengthSystem
embedding_cache.CHUNK_TEXTS = 10

class Killed(LengthSystem):
    def encode(self, texts, instruction, side="query"):
        if len(self.asked) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts, instruction, side)

embedding_cache.CachedSystem(Killed(), Path(sys.argv[1])).encode([str(number) for number in range(100, 150)], "")
"""


def test_kill_9_costs_the_chunk_in_flight(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(encode(tmp_path, LengthSystem(), [str(number) for number in range(100, 150)])) == 20


def test_a_task_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one instruction lie side by side, so a take spans no other's."""
    spans: list[list[str]] = []
    take = ShardStore.take

    def watched(store: ShardStore, ids: Sequence[str]) -> pa.Table:
        spans.append(list(ids))
        return take(store, ids)

    monkeypatch.setattr(ShardStore, "take", watched)
    bare = LengthSystem(prompting="bare")
    encode(tmp_path, bare, ["a", "b"], "Say:")
    encode(tmp_path, bare, ["c", "d"], "Ask:")
    encode(tmp_path, bare, ["a", "b", "c", "d"], "Tell:")
    assert len(spans) == 2
    assert all(len({row_id[:8] for row_id in span}) == 1 and span == sorted(span) for span in spans)
