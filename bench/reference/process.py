"""Measured processes, seen from the script that compares them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.common import ROOT


class Peer:
    """One side of the comparison in a process of its own; `loaded` is its memory before the first order.

    Use it as a context; it ends when the context does.
    """

    def __init__(self, module: str, python: str | Path, work: Path, **settings: str) -> None:
        """Args: module: what to run; python: its interpreter; work: workspace; settings: more command-line options."""
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, "-m", module, "--work", work, *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.loaded = self._answer()

    def ask(self, do: str, **order: Any) -> Any:
        """Give an order and wait for its answer.

        Raises:
            SystemExit: the process failed; its stderr is shown.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            sys.exit(f"{' '.join(map(str, self._process.args))} failed:\n{self._log.read()[-4000:]}")  # type: ignore[arg-type]
        return json.loads(line)
