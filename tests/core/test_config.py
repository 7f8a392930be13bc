"""params.yaml: exact types, and every mistake in one message with its file and key."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.core.config import Params, load, read_yaml
from pipeline.core.errors import ParamsError


class Disk(Params):
    kind: Literal["disk"]
    path: str


class Hub(Params):
    kind: Literal["hub"]
    name: str


class Sources(Params):
    sources: list[Annotated[Disk | Hub, Field(discriminator="kind")]]


class Optimizer(Params):
    lr: float
    steps: int


class Model(Params):
    name: str
    revision: str | None = None


class Inputs(Params):
    model: Model
    optimizer: Optimizer


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def messages(path: Path, model: type[Params], *, whole_file: bool = False) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        load(path, model, whole_file=whole_file)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-05", 1e-5), ("1e5", 1e5), ("1E-4", 1e-4), ("3.0e-4", 3e-4), ("2.5e-4", 2.5e-4), (".5", 0.5), ("1", 1.0)],
)
def test_numbers_as_dvc_writes_them_are_floats(tmp_path: Path, written: str, value: float) -> None:
    path = write(tmp_path, f"model: {{name: m}}\noptimizer:\n  lr: {written}\n  steps: 1\n")
    assert load(path, Inputs).optimizer.lr == value


def test_yaml_1_2_words_stay_words(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "a: yes\nb: off\nc: no\n")) == {"a": "yes", "b": "off", "c": "no"}


def test_every_mistake_of_every_section_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  nam: m\noptimizer:\n  lr: fast\n  stepz: 3\n")
    assert sorted(messages(path, Inputs)) == [
        f"{path}: model.nam: unknown key (did you mean 'name'?)",
        f"{path}: model.name: missing",
        f"{path}: optimizer.lr: Input should be a valid number (got 'fast')",
        f"{path}: optimizer.steps: missing",
        f"{path}: optimizer.stepz: unknown key (did you mean 'steps'?)",
    ]


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: m}\n")
    assert messages(path, Inputs) == [f"{path}: optimizer: missing"]


@pytest.mark.parametrize("steps", ["1.0", "'1'", "true", "null", "[1]"])
def test_integers_are_not_guessed(tmp_path: Path, steps: str) -> None:
    path = write(tmp_path, f"model: {{name: m}}\noptimizer: {{lr: 0.1, steps: {steps}}}\n")
    (line,) = messages(path, Inputs)
    assert line.startswith(f"{path}: optimizer.steps: ")


@pytest.mark.parametrize("lr", [".nan", ".inf", "'0.1'", "true"])
def test_floats_are_finite_numbers(tmp_path: Path, lr: str) -> None:
    path = write(tmp_path, f"model: {{name: m}}\noptimizer: {{lr: {lr}, steps: 1}}\n")
    (line,) = messages(path, Inputs)
    assert line.startswith(f"{path}: optimizer.lr: ")


def test_other_sections_are_ignored_unless_the_whole_file_is_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: m}\noptimizer: {lr: 0.1, steps: 1}\noptimiser: {}\n")
    assert load(path, Inputs).model == Model(name="m")
    assert messages(path, Inputs, whole_file=True) == [f"{path}: optimiser: unknown key (did you mean 'optimizer'?)"]


def test_an_unknown_key_lists_the_known_ones_when_none_is_close(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: m, zzz: 1}\noptimizer: {lr: 0.1, steps: 1}\n")
    assert messages(path, Inputs) == [f"{path}: model.zzz: unknown key (known: name, revision)"]


def test_mistakes_inside_a_list_of_alternatives_carry_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "sources:\n  - {kind: disk, name: x}\n  - {kind: hub, name: 3}\n  - {kind: ftp}\n")
    lines = messages(path, Sources)
    assert len(lines) == 4
    assert lines[0] == f"{path}: sources.0.disk.path: missing"
    assert lines[1].startswith(f"{path}: sources.0.disk.name: unknown key")
    assert lines[2].startswith(f"{path}: sources.1.hub.name: Input should be a valid string")
    assert "'ftp'" in lines[3]
    assert lines[3].startswith(f"{path}: sources.2: ")


def test_values_do_not_change_after_loading(tmp_path: Path) -> None:
    inputs = load(write(tmp_path, "model: {name: m}\noptimizer: {lr: 0.1, steps: 1}\n"), Inputs)
    with pytest.raises(ValueError, match="frozen"):
        inputs.model.name = "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: 1\na: 2\n", "is not valid YAML"),
        ("- 1\n", "must be a mapping of sections, not list"),
        ("", "must be a mapping of sections, not NoneType"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ParamsError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"nowhere.yaml does not exist: run from the project's root"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ParamsError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ParamsError, match="is not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")
