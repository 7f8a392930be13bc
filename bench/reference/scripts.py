"""The reference's scripts as modules."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock


def script(source: Path, name: str, without: Sequence[str]) -> ModuleType:
    """`scripts/<name>.py` of the reference, imported from the folder that holds its unpacked source archive.

    Its command line and its data sets need packages that what is measured does not: those in `without` are empty here,
    which also keeps them out of the memory that is measured.
    """
    (path,) = source.glob(f"*/scripts/{name}.py")
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    empty = {package: mock.MagicMock() for package in without}
    with mock.patch.dict(sys.modules, empty), mock.patch("transformers.utils.versions.require_version"):
        spec.loader.exec_module(module)
    return module
