"""Our encoding: an encoder folder, loaded and used as `python -m pipeline encode` and the evaluation do.

.venv/bin/python -m bench.encoding.ours --work DIR --dtype bf16 --device cpu
"""

import argparse
from typing import Any

import numpy as np

from bench.encoding.child import serve
from pipeline.encoder.folder.read import read_encoder

LOADED = {"bf16": "bfloat16", "fp32": "float32"}


class Ours:
    """One encoder."""

    def __init__(self, settings: argparse.Namespace) -> None:
        """Args: settings: of the child process; the workspace holds the encoder."""
        dtype: Any = LOADED[settings.dtype]
        self._encoder = read_encoder(settings.work / "encoder", device=settings.device, dtype=dtype)

    def encode(self, texts: list[str], instruction: str, way: str) -> "np.ndarray[Any, Any]":
        """See `Side.encode`; there is one way."""
        return self._encoder.encode(texts, instruction=instruction)


if __name__ == "__main__":
    serve(Ours)
