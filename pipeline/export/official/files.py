"""The files of a checkpoint of the authors, read without running anything that is in them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.artifacts import digest_of, file_sha256
from pipeline.core.errors import ArtifactError
from pipeline.export.official import format as official

if TYPE_CHECKING:
    from torch import Tensor

# All that is read of a checkpoint on the hub; among the rest may be optimiser states and pickled training arguments.
_FILES = (
    official.RUN_CONFIG,
    official.MODEL_CONFIG,
    official.ADAPTER_CONFIG,
    official.ADAPTER_WEIGHTS,
    official.ADAPTER_PICKLE,
    official.RECONSTRUCTION,
    official.ALIGNMENT,
    official.TOKENIZER,
    official.TOKENIZER_CONFIG,
)


def fetch(source: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, and what pins it: hub name and commit, or the sha256 over the files that are read.

    Raises:
        ArtifactError: it cannot be found.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ArtifactError(f"--revision {revision}: {source} is a folder, only models of the hub have revisions")
        hashes = {name: file_sha256(folder / name) for name in _FILES if (folder / name).is_file()}
        return folder, {"name": source, "sha256": digest_of(hashes)}
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ArtifactError(f"folder {source} does not exist")
    return _download(source, revision)


def _download(name: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"cannot load '{name}' at revision {revision or 'main'}: {reason}") from None
    return folder, {"name": name, "revision": folder.name}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: the checkpoint is not complete") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return content


class RunConfig:
    """Top-level texts and lists of texts of `run_config.yml`.

    They are taken from the nodes of the document, so that no tag in it makes an object. Of several values of one key
    the last counts: a training run that starts again appends to the file.
    """

    def __init__(self, folder: Path) -> None:
        """Read the file in a checkpoint's folder, or, for a checkpoint within a training run, in the run's.

        Raises:
            ArtifactError: there is none, or it is not a YAML mapping.
        """
        from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

        self._path = _run_config_file(folder)
        root = _yaml_nodes(self._path)
        if not isinstance(root, MappingNode):
            raise ArtifactError(f"{self._path} is not a mapping")
        self._texts: dict[str, str] = {}
        self._lists: dict[str, list[str]] = {}
        for key, value in root.value:
            if isinstance(value, ScalarNode):
                self._texts[str(key.value)] = str(value.value)
            elif isinstance(value, SequenceNode):
                self._lists[str(key.value)] = [str(item.value) for item in value.value]

    def text(self, key: str, default: str = "") -> str:
        """The value of a key; the default where it has none."""
        value = self._texts.get(key, "")
        # The package writes Python's None as a word.
        return default if value in ("", "None", "null", "~") else value

    def texts(self, key: str) -> list[str]:
        """The values of a key that has a list.

        Raises:
            ArtifactError: it has none.
        """
        if not self._lists.get(key):
            raise ArtifactError(f"{self._path}: {key} is missing or not a list")
        return self._lists[key]


def _run_config_file(folder: Path) -> Path:
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / official.RUN_CONFIG).is_file():
            return place / official.RUN_CONFIG
    raise ArtifactError(f"{folder} is no checkpoint of the authors' package: it holds no {official.RUN_CONFIG}")


def _yaml_nodes(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None


def unpickle(path: Path) -> Any:
    """Tensors and plain values of a pickle.

    Raises:
        ArtifactError: it asks for anything else, or is damaged.
    """
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is damaged, or asks for more than tensors and plain values"
        raise ArtifactError(f"{path} is refused: {what}; that could run any code, and nothing of it was run") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def named_tensors(content: Any, path: Path) -> "dict[str, Tensor]":
    """Finite tensors by name.

    Raises:
        ArtifactError: `content` of the file `path` is anything else.
    """
    import torch

    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ArtifactError(f"{path} does not hold named tensors")
    wrong = [name for name, tensor in content.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ArtifactError(f"{path}: {wrong[0]} holds NaN or infinite values")
    return dict(content)


def adapter_tensors(folder: Path) -> "dict[str, Tensor]":
    """Tensors of the adapter under peft's names.

    Raises:
        ArtifactError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, pickled = folder / official.ADAPTER_WEIGHTS, folder / official.ADAPTER_PICKLE
    if not weights.is_file() and pickled.is_file():
        return named_tensors(unpickle(pickled), pickled)
    try:
        return named_tensors(load_file(weights), weights)
    except FileNotFoundError:
        raise ArtifactError(f"{weights} is missing: the checkpoint is not complete") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights} cannot be read: {error}") from None
