"""How many processes train, and what one of several knows and says."""

import os

import pytest

from pipeline.core.errors import BackboneError, TrainingError
from pipeline.parallel.ranks import Failure, FailureCause, is_first, launched, rank_count, rank_process


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them."""
    monkeypatch.setattr("pipeline.parallel.devices.visible_gpus", lambda: list("0123"))


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.parallel.devices.visible_gpus", list)


def test_auto_is_one_for_each_gpu(gpus: None) -> None:
    assert rank_count("auto", batch_size=32) == 4


def test_auto_is_one_on_a_cpu(no_gpus: None) -> None:
    assert rank_count("auto", batch_size=32) == 1


def test_a_number_is_taken_on_a_cpu_and_up_to_the_gpus(no_gpus: None) -> None:
    assert rank_count(3, batch_size=32) == 3


def test_more_than_gpus_are_refused(gpus: None) -> None:
    assert rank_count(4, batch_size=32) == 4
    with pytest.raises(TrainingError, match=r"^processes: 5 .* 4 GPU\(s\) are visible .* at most 4"):
        rank_count(5, batch_size=32)


def test_more_than_rows_of_a_step_are_refused(gpus: None) -> None:
    with pytest.raises(TrainingError, match=r"^processes: 4, .* 3 rows .*batch_size.* at most 3"):
        rank_count("auto", batch_size=3)


def test_the_environment_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_first()
    assert not launched()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()
    assert not is_first()


def test_alone_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyError), rank_process():
        assert dict(os.environ) == before
        raise KeyError


def test_who_is_to_blame() -> None:
    failures = {
        "user": Failure.of(BackboneError("no such backbone")),
        "crash": Failure.of(KeyError("oops")),
        "neighbour": Failure.of(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")),
    }
    assert sorted(failures, key=lambda name: failures[name].cause) == ["user", "crash", "neighbour"]
    assert (failures["user"].message, failures["user"].details) == ("no such backbone", "")
    assert failures["crash"].message == "KeyError: 'oops'"
    assert FailureCause.CRASH < FailureCause.UNKNOWN < FailureCause.NEIGHBOUR
