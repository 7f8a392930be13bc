"""What of Ray needs no cluster; `tests/generate/engines/test_ray_cluster.py` has one."""

import pytest

from pipeline.parallel.ray_cluster import last_error, worker_environment


def test_the_innermost_error_of_a_traceback() -> None:
    message = (
        "The actor died\n  File 'x'\nValueError: first\n\n  File 'y'\n"
        "pydantic_core.ValidationError: 1 error\n  bad value\nmore"
    )
    assert last_error(RuntimeError(message)) == "pydantic_core.ValidationError: 1 error bad value"
    assert last_error(RuntimeError("no more\nat all")) == "RuntimeError: no more"


def test_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    variables = worker_environment(threads=3)
    assert (variables["HF_HUB_OFFLINE"], variables["OMP_NUM_THREADS"]) == ("1", "3")
    assert "HF_TOKEN" not in variables  # Ray shows the variables of an actor to everyone
    assert "OMP_NUM_THREADS" not in worker_environment()
