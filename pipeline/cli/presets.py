"""Presets of backbones and teachers, and switching params.yaml to them: `python -m pipeline backbone NAME`.

The file keeps its comments, its order and everything that a preset does not name.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.backbone.loading import BackboneParams, DType, Pool, Template
from pipeline.backbone.sizes import ModelSizes
from pipeline.core.config import Params, read_yaml, validate
from pipeline.core.errors import ParamsError
from pipeline.core.files import write_bytes
from pipeline.core.target_transform import DECORRELATE
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.adapters import AdapterParams
from pipeline.embed.teachers.registry import TRAINED
from pipeline.embed.teachers.template import TEMPLATES
from pipeline.teach.params import TeachParams
from pipeline.teach.plan import fitting_rows
from pipeline.train.params import TrainParams

PRESETS_FILE = Path(__file__).with_name("presets.yaml")
TEACHERS_FILE = Path(__file__).with_name("teachers.yaml")
PAPER_FILE = Path(__file__).with_name("paper.yaml")
# The paper's limit for queries and responses; what the released teachers were made for.
TEACHER_TOKENS = 512
# The backbone's own teachers. Any has its echo reading, and an LLM2Vec that the stage teach trains.
PUBLISHED, ECHO, TRAINED_HERE = "published", "echo", "trained"
ECHO_TRANSFORM = DECORRELATE.model_dump(exclude_defaults=True)
# Sections whose defaults need not be written into a file.
_MODELS: dict[str, type[Params]] = {"embed.teacher": TeacherParams, "train": TrainParams}


class PresetTeacher(Params):
    """The backbone as its own teacher: an LLM2Vec by published adapters; without any, its echo reading.

    `batch_tokens`: tokens of a forward pass by GPU memory in GB.
    """

    adapters: list[AdapterParams] = Field(default_factory=list)
    batch_tokens: dict[int, int]


class PresetReading(Params):
    """How the student reads a text: params of `train`. The defaults are those of the shipped params file."""

    template: Template = "chat"
    pool: Pool = "tokens"
    max_query_tokens: int = TEACHER_TOKENS


class Preset(Params):
    """A backbone, its teacher and how it is trained.

    The learning rate is the paper's if the teacher is published, else a guess after a model of like size. `reading` is
    there where it was measured that another one than the default is better (docs/results.md).
    """

    backbone: BackboneParams
    teacher: PresetTeacher
    reading: PresetReading | None = None
    learning_rate: float
    sizes: ModelSizes

    @property
    def published(self) -> bool:
        return bool(self.teacher.adapters)

    @property
    def teacher_name(self) -> str:
        """The teacher that is set unless another one is named."""
        return PUBLISHED if self.published else ECHO

    def teacher_params(self, memory: int, name: str) -> TeacherParams:
        """The teacher `name` of the backbone's own for a GPU of `memory` GB.

        A published one names its base, so it stays when the backbone changes; the others follow the backbone.
        """
        common: dict[str, Any] = {"dtype": self.backbone.dtype, "batch_tokens": self.teacher.batch_tokens[memory]}
        if name == ECHO:  # the limit counts both copies of a text
            return TeacherParams(kind="backbone", template=ECHO, max_tokens=2 * TEACHER_TOKENS, **common)
        if name == TRAINED_HERE:
            return TeacherParams(kind=TRAINED, max_tokens=TEACHER_TOKENS, **common)
        base: dict[str, Any] = {"name": self.backbone.name, "revision": self.backbone.revision}
        adapters = self.teacher.adapters
        return TeacherParams(kind="llm2vec", **base, adapters=adapters, max_tokens=TEACHER_TOKENS, **common)


class OtherTeacher(Params):
    """A teacher of another family, a sentence-transformers model that gives vectors of length 1."""

    name: str
    revision: str | None
    dtype: DType
    batch_tokens: dict[int, int]

    def params(self, memory: int) -> TeacherParams:
        """For a GPU of `memory` GB."""
        return TeacherParams(
            kind="sentence-transformers",
            name=self.name,
            revision=self.revision,
            max_tokens=TEACHER_TOKENS,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens[memory],
        )


@cache
def presets() -> dict[str, Preset]:
    """The presets of backbones by name; raises ParamsError if presets.yaml has mistakes."""
    content = read_yaml(PRESETS_FILE)
    return {name: validate(entry, Preset, where=f"presets.yaml: {name}") for name, entry in content.items()}


@cache
def teachers() -> dict[str, OtherTeacher]:
    """The teachers of other families by name; raises ParamsError if teachers.yaml has mistakes."""
    content = read_yaml(TEACHERS_FILE)
    return {name: validate(entry, OtherTeacher, where=f"teachers.yaml: {name}") for name, entry in content.items()}


def preset_of(backbone: str) -> Preset | None:
    """The preset whose backbone has this hub name."""
    return next((preset for preset in presets().values() if preset.backbone.name == backbone), None)


def switch(path: Path, name: str, memory: int, teacher: str | None = None, *, paper: bool = False) -> list[str]:
    """Set the params of a preset in a params file for `memory` GB; returns the changes, one line each.

    `teacher` is one of `teachers()`, `ECHO` or `TRAINED_HERE`; None: the published LLM2Vec of the backbone, without one
    its echo reading. `paper`: and the paper's settings, see `PAPER_FILE`; with it `teacher` None is an LLM2Vec.

    Raises:
        ParamsError: unknown preset, teacher or memory, or the file lacks a section that the preset sets.
    """
    if name not in presets():
        raise ParamsError(f"unknown backbone '{name}' (known: {', '.join(presets())})")
    if teacher not in (known := (None, ECHO, TRAINED_HERE, *teachers())):
        raise ParamsError(f"unknown '{teacher}' (known: {', '.join(filter(None, known))})", argument="teacher")
    preset = presets()[name]
    if teacher is None:
        teacher = TRAINED_HERE if paper and not preset.published else preset.teacher_name
    if memory not in preset.teacher.batch_tokens:
        sizes = ", ".join(map(str, preset.teacher.batch_tokens))
        raise ParamsError(f"no batch sizes for {memory} GB (known: {sizes})", argument="memory")
    return _edit(path, lambda content: _values(preset, teacher, memory, content, paper=paper), keep_pins=True)


def lay_over(path: Path, changes: Mapping[str, Any]) -> list[str]:
    """Set the values of nested mappings in a params file; returns the changes, one line each.

    A mapping goes over the file's own key by key, anything else replaces it.
    """
    return _edit(path, lambda content: dict(_leaves(changes, content)), keep_pins=False)


def _leaves(changes: Mapping[str, Any], content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each mapping of `changes` that is one in the file too."""
    inner = {
        key
        for key, value in changes.items()
        if value and isinstance(value, dict) and isinstance(content.get(key), CommentedMap)
    }
    if own := {key: value for key, value in changes.items() if key not in inner}:
        yield place, own
    for key in sorted(inner):
        yield from _leaves(changes[key], content[key], f"{place}.{key}" if place else key)


def _edit(path: Path, values: Callable[[Any], dict[str, dict[str, Any]]], *, keep_pins: bool) -> list[str]:
    """Set values by their place in a file, of whose content they are a function; returns the changes.

    `keep_pins`: a model without a revision keeps the one in the file.
    """
    read_yaml(path)  # says what is wrong with the file, if anything is
    yaml = _round_trip()
    content = yaml.load(path.read_text(encoding="utf-8"))
    changes = [
        line
        for place, found in values(content).items()
        for line in _set(_section(path, content, place), place, found, keep_pins=keep_pins)
    ]
    sink = StringIO()
    yaml.dump(content, sink)
    write_bytes(path, sink.getvalue().encode())
    return changes


def _values(preset: Preset, teacher: str, memory: int, content: Any, *, paper: bool) -> dict[str, dict[str, Any]]:
    """The values to set, by section.

    Targets of an LLM2Vec are raw hidden states with norms in the hundreds: the paper's mean over dimensions balances
    the losses, and float16 holds them with more digits than bfloat16. Of unit-length vectors, untransformed, the sum
    does. Learning rates are for the paper's random start; they would undo a warm start, so none is set then
    (docs/results-log.md).
    """
    other = teachers().get(teacher)
    train: dict[str, Any] = {
        "align_reduction": "sum" if other else "mean",
        "learning_rate": preset.learning_rate,
        "micro_batch_size": "auto",
        **_response_form(teacher, content),
        **_reading(preset, content),
    }
    warm_start = (content.get("train") or {}).get("warm_start") or {}
    if warm_start.get("enabled") and not paper:
        del train["learning_rate"]
    found = other.params(memory) if other else preset.teacher_params(memory, teacher)
    values = {
        "backbone": preset.backbone.model_dump(include={"name", "revision", "dtype", "chat_template_kwargs"}),
        "embed.teacher": found.model_dump() | {"template": _template_name(found.template)},
        "embed": {"normalize": False, "dtype": "float16", **_transform(teacher, content)},
        "train": train,
        **_teach_values(preset, memory, content),
    }
    for place, own in (read_yaml(PAPER_FILE) if paper else {}).items():
        if place != "train.heldout" or (content.get("train") or {}).get("heldout"):
            values[place] = {**values.get(place, {}), **own}
    return values


def _template_name(template: str) -> str:
    return next((name for name, known in TEMPLATES.items() if known == template), template)


def _transform(teacher: str, content: Any) -> dict[str, Any]:
    """That of the targets; an LLM2Vec keeps the file's own, unless it is the one that the echo reading had."""
    if teacher == ECHO:
        return {"transform": ECHO_TRANSFORM}
    if teacher in teachers():
        return {"transform": {"kind": "none"}}
    own = (content.get("embed") or {}).get("transform")
    return {"transform": {"kind": "auto"}} if own == ECHO_TRANSFORM else {}


def _response_form(teacher: str, content: Any) -> dict[str, Any]:
    """Predictions are added to readings where the targets are readings; the file's form stays where it can."""
    train, embed = (content.get(name) or {} for name in ("train", "embed"))
    mapped = bool(embed.get("queries"))
    if teacher == ECHO:
        return {"response_form": "added", "decorrelate_reading": not mapped}
    return {"response_form": "beside"} if train.get("response_form") == "added" and not mapped else {}


def _reading(preset: Preset, content: Any) -> dict[str, Any]:
    """The preset's; without one the file's own stays, unless it is the one that the preset before had."""
    if preset.reading:
        return preset.reading.model_dump()
    before, train = preset_of((content.get("backbone") or {}).get("name", "")), content.get("train") or {}
    if before and before.reading and before.reading.model_dump().items() <= train.items():
        return PresetReading().model_dump()
    return {}


def _teach_values(preset: Preset, memory: int, content: Any) -> dict[str, dict[str, Any]]:
    """Texts of a forward pass of each phase in the file, by its lengths and adapters."""
    given = {key: value for key, value in (content.get("teach") or {}).items() if key in ("mntp", "simcse") and value}
    teach = validate({**given, "dtype": preset.backbone.dtype}, TeachParams, where="teach")
    return {
        f"teach.{name}": {"micro_batch_size": fitting_rows(teach, getattr(teach, name), preset.sizes, memory * 1e9)}
        for name in given
    }


def _section(path: Path, content: Any, place: str) -> CommentedMap:
    section = content
    for key in filter(None, place.split(".")):
        section = section.get(key)
        if not isinstance(section, CommentedMap):
            raise ParamsError(f"{path}: {place}: missing")
    return section


def _set(section: CommentedMap, place: str, values: dict[str, Any], *, keep_pins: bool) -> list[str]:
    fields = _MODELS[place].model_fields.items() if place in _MODELS else ()
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields}
    if "template" in defaults:  # a file names templates, params hold their text
        defaults["template"] = _template_name(defaults["template"])
    changes, before = [], dict(section)
    for key in values:
        value = _keeping_pins(before, values, key) if keep_pins else values[key]
        # What a file leaves to the default need not be written into it.
        unset = key not in section and key in defaults and value == defaults[key]
        if unset or (key in section and section[key] == value):
            continue
        changes.append(f"{place}.{key}".lstrip(".") + f": {_shown(section.get(key))} -> {_shown(value)}")
        if key in section:
            section[key] = _replaced(section[key], value)
        else:
            section.insert(_position(section, key, list(values)), key, _node(value))
    return changes


def _keeping_pins(before: dict[str, Any], values: dict[str, Any], key: str) -> Any:
    """The preset's value of a key; a model without a revision keeps the one in the file."""
    value, current = values[key], before.get(key)
    if key == "revision" and value is None and values.get("name") and values["name"] == before.get("name"):
        return current
    if not (isinstance(value, list) and isinstance(current, list)):
        return value
    pins = {item["name"]: item.get("revision") for item in current if isinstance(item, dict) and "name" in item}
    return [item | {"revision": item["revision"] or pins.get(item["name"])} for item in value]


def _position(section: CommentedMap, key: str, order: list[str]) -> int:
    """After the keys that come before it, but never last: the comment of the next section belongs to the last key."""
    earlier = order[: order.index(key)]
    place = 1 + max((index for index, known in enumerate(section) if known in earlier), default=-1)
    return min(place, max(len(section) - 1, 0))


def _replaced(before: Any, value: Any) -> Any:
    """The new value in the old one's style: comments inside a list, flow style of a mapping."""
    if isinstance(before, CommentedMap) and isinstance(value, dict):
        before.clear()
        before.update(value)
        before.fa.set_flow_style()
        return before
    if before and value and isinstance(before, CommentedSeq) and isinstance(value, list):
        del before[len(value) :]
        for index, new in enumerate(value):
            if index >= len(before):
                before.append(_node(new))
            elif isinstance(before[index], CommentedMap) and isinstance(new, dict):
                _overwrite(before[index], new)
            else:
                before[index] = _node(new)
        return before
    return _node(value)


def _overwrite(before: CommentedMap, value: dict[str, Any]) -> None:
    for key in [key for key in before if key not in value]:
        del before[key]
    before.update(value)


def _node(value: Any) -> Any:
    match value:
        case float():
            return _round_trip().load(_number(value))
        case list():
            return CommentedSeq(map(_node, value))
        case dict():
            flow = CommentedMap(value)
            flow.fa.set_flow_style()
            return flow
        case _:
            return value


def _number(value: float) -> str:
    """A number that YAML 1.1 and 1.2 both read as one: 0.35, and 3.0e-4 where Python writes 3e-04."""
    short = f"{value:.1e}".replace("e-0", "e-")
    return short if 0 < abs(value) < 1e-3 and float(short) == value else repr(value)


def _shown(value: Any) -> str:
    """A value in the line of a change; models by name and the start of their commit."""
    if not isinstance(value, list):
        return str(dict(value) if isinstance(value, dict) else value)
    if not all(isinstance(item, dict) and "revision" in item for item in value):
        return str([dict(item) if isinstance(item, dict) else item for item in value])
    pins = [(item.get("name"), item["revision"]) for item in value]
    return " + ".join(f"{name} ({revision[:12] if revision else 'not pinned'})" for name, revision in pins) or "none"


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml
