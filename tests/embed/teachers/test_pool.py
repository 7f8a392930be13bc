"""Several teacher processes give what one gives, in the same order."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import TeacherError
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.pool import ParallelTeacher, open_teacher
from pipeline.embed.teachers.stub import HashTeacher

TEXTS = [f"{'long ' * (index % 7)}text {index}" for index in range(50)]
BACKBONE = BackboneParams(name="none/such")


def hash_params(batch_tokens: int = 8, **options: Any) -> TeacherParams:
    return TeacherParams(kind="hash", batch_tokens=batch_tokens, options={"width": 8, **options})


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def works(pid: int) -> bool:
    """Whether it is a worker process that still runs."""
    try:
        return "spawn_main" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:  # gone, or dead and not yet waited for
        return False


def test_the_same_embeddings_in_the_same_order() -> None:
    expected = HashTeacher(width=8)
    with open_teacher(hash_params(), BACKBONE, 3) as teacher:
        assert isinstance(teacher, ParallelTeacher)
        assert (teacher.width, teacher.identity, teacher.processes) == (8, expected.identity, 3)
        for texts in (TEXTS, TEXTS[:1], TEXTS[::-1]):
            np.testing.assert_array_equal(teacher.embed(texts), expected.embed(texts))
        assert teacher.embed([]).shape == (0, 8)
        assert teacher.token_lengths(TEXTS) == [index % 7 + 2 for index in range(50)]


def test_one_process_is_the_teacher_itself() -> None:
    before = children()
    with open_teacher(hash_params(), BACKBONE, "auto") as teacher:
        assert isinstance(teacher, HashTeacher)
        assert children() == before


def test_a_dead_process_is_named() -> None:
    before = children()
    with open_teacher(hash_params(delay=0.05), BACKBONE, 2) as teacher:
        victim = max(child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(TeacherError, match=r"teacher process \d \(cores .*\) died \(killed by SIGKILL"):
            teacher.embed(TEXTS)
    assert not [pid for pid in children() - before if works(pid)]


def test_what_a_process_refuses_comes_as_its_own_error() -> None:
    message = r"^embed\.teacher\.options: teacher process \d \(.*\): \{'width': 0\}"
    with pytest.raises(TeacherError, match=message), open_teacher(hash_params(width=0), BACKBONE, 2):
        pass


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with (
        pytest.raises(TeacherError, match=r"^data_parallel: 3 .* but 2 GPU\(s\) are visible"),
        open_teacher(hash_params(), BACKBONE, 3),
    ):
        pass


@pytest.mark.models
@pytest.mark.slow
def test_a_real_teacher_in_two_processes(small_teacher: Path) -> None:
    params = TeacherParams(kind="sentence-transformers", name=str(small_teacher), max_tokens=64, batch_tokens=128)
    with open_teacher(params, BACKBONE, 1) as one:
        expected, lengths = one.embed(TEXTS), one.token_lengths([*TEXTS, "word " * 100])
        identity = one.identity
        assert [length > 64 for length in lengths] == [False] * len(TEXTS) + [True]
    with open_teacher(params, BACKBONE, 2) as two:
        np.testing.assert_allclose(two.embed(TEXTS), expected, atol=2e-6)
        assert two.token_lengths([*TEXTS, "word " * 100]) == lengths
        assert (two.identity, two.max_tokens) == (identity, 64)
