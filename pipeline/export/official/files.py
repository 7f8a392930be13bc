"""The checkpoint format of the paper's authors: what `LLM2VecGenModel.from_pretrained` of their package (0.1.3) reads.

    run_config.yml                      name of the backbone, dtype of everything, texts of the N new tokens
    encoder_decoder_config.json         "encoding_mode": "last_n_tokens", "save_decoder": false
    encoder/                            a peft adapter, and the config of the backbone with N more tokens
    reconstruction_mlp, alignment_mlp   pickles: the state dict of a linear layer and its shape
    tokenizer.json, tokenizer_config.json   the backbone's, with the N new tokens added in order

The adapter is of type TRAINABLE_TOKENS, or of type LORA with `trainable_token_indices`; either way its
`...trainable_tokens_delta` `[N, d]` holds the rows themselves, for the ids that its config lists. It may also hold the
whole embedding table, which is the backbone's.

Their `encode` appends the texts of the new tokens to the bare text, truncates both together to 512 tokens but keeps the
new ones, runs everything in the dtype of `run_config.yml`, and averages alignment(reconstruction(h)) over the last n
positions, without normalising.

Files are read here without running anything that is in them.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError, first_line
from pipeline.core.files import digest_of, file_sha256

if TYPE_CHECKING:
    from torch import Tensor

RUN_CONFIG = "run_config.yml"
MODEL_CONFIG = "encoder_decoder_config.json"
ENCODER = "encoder"
RECONSTRUCTION = "reconstruction_mlp"
ALIGNMENT = "alignment_mlp"
ADAPTER_CONFIG = f"{ENCODER}/adapter_config.json"
ADAPTER_WEIGHTS = f"{ENCODER}/adapter_model.safetensors"
ADAPTER_PICKLE = f"{ENCODER}/adapter_model.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Default `max_length` of their `encode`: text and new tokens together.
MAX_LENGTH = 512
# peft's prefix of the names of wrapped modules.
PREFIX = "base_model.model."
ROWS = "trainable_tokens_delta"
# Read from a checkpoint on the hub; others may be optimiser states and pickled training arguments.
_FILES = (
    RUN_CONFIG,
    MODEL_CONFIG,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTER_PICKLE,
    RECONSTRUCTION,
    ALIGNMENT,
    TOKENIZER,
    TOKENIZER_CONFIG,
)


def token_texts(count: int) -> list[str]:
    """Texts of the new tokens in the authors' runs."""
    return [f"<question{number}>" for number in range(1, count + 1)]


def fetch(source: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, and what pins it: hub name and commit, or the sha256 over the files that are read.

    Raises ArtifactError if it is not found.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            message = f"{revision}: {source} is a folder, only models on the hub have revisions"
            raise ArtifactError(message, argument="revision")
        hashes = {name: file_sha256(folder / name) for name in _FILES if (folder / name).is_file()}
        return folder, {"name": source, "sha256": digest_of(hashes)}
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ArtifactError(f"folder {source} does not exist")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ArtifactError(f"cannot load '{source}' at revision {revision or 'main'}: {reason}") from None
    return folder, {"name": source, "revision": folder.name}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ArtifactError if the file is missing or holds anything else."""
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

    They are read from the nodes of the document, so no tag in it creates an object. The last value of a key counts,
    because a restarted training run appends to the file.
    """

    def __init__(self, folder: Path) -> None:
        """Read the file in a checkpoint's folder, or in the folder of its training run.

        Raises ArtifactError if there is none, or it is not a YAML mapping.
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
        value = self._texts.get(key, "")
        # Their package writes Python's None as a word.
        return default if value in ("", "None", "null", "~") else value

    def texts(self, key: str) -> list[str]:
        """The list of a key; raises ArtifactError if there is none."""
        if not self._lists.get(key):
            raise ArtifactError(f"{self._path}: {key} is missing or not a list")
        return self._lists[key]


def _run_config_file(folder: Path) -> Path:
    for parent in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (parent / RUN_CONFIG).is_file():
            return parent / RUN_CONFIG
    raise ArtifactError(f"{folder} is no checkpoint of the authors' package: it holds no {RUN_CONFIG}")


def _yaml_nodes(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None


def unpickle(path: Path) -> Any:
    """Tensors and plain values of a pickle; raises ArtifactError if it holds anything else, or is damaged."""
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is damaged, or asks for more than tensors and plain values"
        raise ArtifactError(f"{path} is refused: {what}; that could run any code, none of which was run") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def named_tensors(content: Any, path: Path) -> "dict[str, Tensor]":
    """Finite tensors by name; raises ArtifactError if `content` of the file `path` is anything else."""
    import torch

    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ArtifactError(f"{path} does not hold named tensors")
    wrong = [name for name, tensor in content.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ArtifactError(f"{path}: {wrong[0]} holds NaN or infinite values")
    return dict(content)


def adapter_tensors(folder: Path) -> "dict[str, Tensor]":
    """Tensors of the adapter under peft's names; raises ArtifactError if they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, pickled = folder / ADAPTER_WEIGHTS, folder / ADAPTER_PICKLE
    if not weights.is_file() and pickled.is_file():
        return named_tensors(unpickle(pickled), pickled)
    try:
        return named_tensors(load_file(weights), weights)
    except FileNotFoundError:
        raise ArtifactError(f"{weights} is missing: the checkpoint is not complete") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights} cannot be read: {error}") from None
