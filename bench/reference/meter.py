"""Time and memory of a process, on the CPU or on a GPU."""

import time
from pathlib import Path

import torch

MIB = 2**20


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS now, VmHWM the most since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


class Meter:
    """Measures steps on `device`; create it when the model is loaded.

    On a GPU seconds are wall seconds between synchronisations and memory is what torch allocated there; on the CPU
    seconds are those of all threads and memory is the resident set.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._loaded, self._load_peak = self._now(), self._peak()

    def start(self) -> None:
        """Begin a measurement."""
        self._synchronise()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """`seconds` (CPU seconds, on a GPU wall seconds) and `wall` since `start`."""
        self._synchronise()
        wall = time.perf_counter() - self._wall
        return {"seconds": wall if self._cuda else time.process_time() - self._cpu, "wall": wall}

    def memory(self) -> dict[str, float]:
        """MiB: `peak` of the process, `load_peak` of it before the first step, `beyond` what the loaded model takes."""
        peak = self._peak()
        return {"peak": peak, "load_peak": self._load_peak, "loaded": self._loaded, "beyond": peak - self._loaded}

    def forget(self) -> None:
        """Start the peak again from what is held now."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self._loaded = self._load_peak = self._now()

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _now(self) -> float:
        return torch.cuda.memory_allocated() / MIB if self._cuda else resident("VmRSS")

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self._cuda else resident("VmHWM")
