"""Presets of backbones, and switching params.yaml to one: `python -m pipeline backbone NAME`.

The file keeps its comments, its order and everything that a preset does not name.
"""

from functools import cache
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from pipeline.artifacts import write_bytes
from pipeline.backbone import BackboneParams
from pipeline.errors import ParamsError
from pipeline.params import Params, read_yaml, validate


class Shape(Params):
    """Sizes of a decoder-only transformer with a gated feed-forward network."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    bias: bool = False

    def parameters(self) -> int:
        """How many weights such a model has (norms left out)."""
        attention_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * attention_width + 2 * self.hidden * kv_width
        biases = attention_width + 2 * kv_width if self.bias else 0
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (attention + biases + 3 * self.hidden * self.intermediate)


class Preset(Params):
    """A backbone and how it is trained."""

    backbone: BackboneParams
    learning_rate: float
    micro_batch_size: dict[int, int]
    shape: Shape


@cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    with resources.as_file(resources.files("pipeline") / "presets.yaml") as path:
        content = read_yaml(path)
    return {name: validate(entry, Preset, where=f"presets.yaml: {name}") for name, entry in content.items()}


def preset_of(backbone: str) -> Preset | None:
    """The preset whose backbone has this hub name."""
    return next((preset for preset in presets().values() if preset.backbone.name == backbone), None)


def switch(path: Path, name: str, memory: int) -> list[str]:
    """Set the params of a preset in a params file.

    Args:
        path: the params file.
        name: the preset.
        memory: GPU memory in GB that the micro-batch is sized for.

    Returns:
        The changes, one line each.

    Raises:
        ParamsError: unknown preset or memory, or the file has no `backbone` and `train` sections.
    """
    if name not in presets():
        raise ParamsError(f"unknown backbone '{name}' (known: {', '.join(presets())})")
    preset = presets()[name]
    if memory not in preset.micro_batch_size:
        raise ParamsError(f"--memory {memory}: known are {', '.join(map(str, preset.micro_batch_size))}")
    read_yaml(path)  # says what is wrong with the file, if anything is
    yaml = _round_trip()
    content = yaml.load(path.read_text(encoding="utf-8"))
    changes = [
        line for section, values in _values(preset, memory).items() for line in _set(path, content, section, values)
    ]
    sink = StringIO()
    yaml.dump(content, sink)
    write_bytes(path, sink.getvalue().encode())
    return changes


def _values(preset: Preset, memory: int) -> dict[str, dict[str, Any]]:
    return {
        "backbone": preset.backbone.model_dump(include={"name", "revision", "dtype", "chat_template_kwargs"}),
        "train": {"learning_rate": preset.learning_rate, "micro_batch_size": preset.micro_batch_size[memory]},
    }


def _set(path: Path, content: Any, section: str, values: dict[str, Any]) -> list[str]:
    if not isinstance(content.get(section), dict):
        raise ParamsError(f"{path}: {section}: missing")
    changes = []
    for key, value in values.items():
        before = content[section].get(key)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, CommentedMap):
            before_text = dict(before)
            before.clear()
            before.update(value)
            before.fa.set_flow_style()
            changes.append(f"{section}.{key}: {before_text} -> {value}")
        else:
            content[section][key] = _scientific(value) if isinstance(value, float) else value
            changes.append(f"{section}.{key}: {before} -> {value}")
    return changes


def _scientific(value: float) -> Any:
    """The number as `3.0e-4`, which YAML 1.1 and 1.2 both read as a number."""
    return _round_trip().load(f"{value:.1e}".replace("e-0", "e-"))


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml
