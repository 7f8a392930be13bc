"""How many workers there are and where each runs, with GPUs and without."""

import logging
import os

import pytest

from pipeline.core.errors import EngineError
from pipeline.core.run import own_cores
from pipeline.parallel.devices import Device, split_devices, visible_gpus, worker_count


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, named: str | None = None) -> None:
    """Pretend that there are `count` GPUs, under the names of CUDA_VISIBLE_DEVICES if given."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)


def count(wanted: int | str, gpus_each: int = 1) -> int:
    return worker_count(wanted, gpus_each=gpus_each, error=EngineError)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "gpus", "expected"),
    [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("GPU-ab, GPU-cd", 2, ["GPU-ab", "GPU-cd"]), ("2,-1,3", 1, ["2"])],
)
def test_gpus_keep_their_names(
    named: str | None, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, gpus, named)
    assert visible_gpus() == expected


def test_auto_is_one_for_each_group_of_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    see_gpus(monkeypatch, 8)
    with caplog.at_level(logging.INFO):
        assert count("auto", gpus_each=2) == 4
    assert "processes: auto = 4 (8 visible GPUs, 2 each)" in caplog.text


def test_auto_is_one_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    see_gpus(monkeypatch, 0)
    with caplog.at_level(logging.INFO):
        assert count("auto") == 1
    assert "no GPU found: one process uses all cores" in caplog.text


def test_more_than_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)
    assert count(2, gpus_each=2) == 2
    message = r"^processes: 3 with 2 GPU\(s\) each, but 4 GPU\(s\) are visible .*at most 2, or to auto"
    with pytest.raises(EngineError, match=message):
        count(3, gpus_each=2)


def test_workers_of_a_model_on_the_cpu_leave_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 1)
    monkeypatch.setattr("pipeline.parallel.devices.own_cores", lambda: list(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_count(4, gpus_each=1, error=EngineError, on_cpu=True) == 4
    assert worker_count("auto", gpus_each=1, error=EngineError, on_cpu=True) == 1
    first, second = split_devices(2, on_cpu=True)
    assert (first.cores, second.cores) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert first.environment == {"OMP_NUM_THREADS": "4"}


def test_on_a_cpu_any_number_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    assert count(5) == 5


def test_groups_of_gpus_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 5, "4,GPU-x,2,1,0")
    first, second = split_devices(2, gpus_each=2)
    assert (first.name, first.environment["CUDA_VISIBLE_DEVICES"]) == ("GPU 4,GPU-x", "4,GPU-x")
    assert (second.name, second.environment["CUDA_VISIBLE_DEVICES"]) == ("GPU 2,1", "2,1")
    assert first.cores == second.cores == ()
    assert "OMP_NUM_THREADS" not in {*first.environment, *second.environment}


def test_on_purpose_on_the_cpu_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    assert visible_gpus() == [] and count("auto") == 1


@pytest.mark.parametrize(
    ("workers", "expected"), [(1, [(2, 3, 4, 6, 7)]), (2, [(2, 3), (4, 6, 7)]), (7, [(2,), (2,), (3,)])]
)
def test_cores_are_shared_out(workers: int, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    monkeypatch.setattr("pipeline.parallel.devices.own_cores", lambda: [2, 3, 4, 6, 7])
    found = split_devices(workers)
    assert len(found) == workers
    assert set(expected) <= {device.cores for device in found}
    assert {core for device in found for core in device.cores} <= {2, 3, 4, 6, 7}
    if workers <= 5:
        assert sorted(core for device in found for core in device.cores) == [2, 3, 4, 6, 7]


@pytest.mark.parametrize(("variable", "threads"), [(None, "2"), ("1", "1"), ("8", "2")])
def test_threads_follow_the_cores_and_never_exceed_what_was_set(
    variable: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, 0)
    monkeypatch.setattr("pipeline.parallel.devices.own_cores", lambda: [0, 1, 2, 3])
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert [device.environment["OMP_NUM_THREADS"] for device in split_devices(2)] == [threads, threads]


def test_names_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    monkeypatch.setattr("pipeline.parallel.devices.own_cores", lambda: [0, 1, 2, 5])
    assert [device.name for device in split_devices(2)] == ["cores 0-1", "cores 2,5"]


def test_own_cores_are_those_of_the_affinity() -> None:
    assert own_cores() == sorted(os.sched_getaffinity(0))


def test_only_the_first_worker_shows_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    assert ["TQDM_DISABLE" in device.environment for device in split_devices(3)] == [False, True, True]
    assert isinstance(split_devices(1)[0], Device)
