"""Build the device that does nothing, and load it. Once loaded it stays: a process that walks does nothing else."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
DEVICE = "cuda:0"


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """The shared library in `folder`, compiled for the installed torch unless it is there.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    torch = _torch_folder()
    program = compiler()
    if program is None:
        raise RuntimeError("the fake GPU needs a C++ compiler (g++ or clang++)")
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    library = folder / f"fake-gpu-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}")  # several processes may compile it at once
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        links = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        command = [
            program,
            "-shared",
            "-fPIC",
            "-std=c++20",
            "-O1",
            "-w",
            *includes,
            str(SOURCE),
            *links,
            "-o",
            str(scratch),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} cannot compile {SOURCE.name}: {done.stderr[-2000:]}")
        scratch.replace(library)
    return library


def load(library: Path) -> None:
    """Register the device with torch, in this process, before anything else touches CUDA."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch

    torch.cuda.current_device = lambda: 0


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed")
    return Path(found.origin).parent
