"""LLM2Vec-Gen as an audited pipeline: embeddings that encode what a language model would answer.

    from pipeline import load, similarity

is the Python API of a trained encoder (`pipeline/api.py`), which is read when one of its names is first asked for:
every stage imports this file, and none needs that one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Embedder, load, similarity

__all__ = ["Embedder", "load", "similarity"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
