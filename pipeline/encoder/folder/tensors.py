"""The tensor files of an encoder folder: the trained student, what makes its embedding, and the student at its start.

student.safetensors   new tokens and both projections
reading.safetensors   how the student's own hidden states are standardised, and mapped into the targets' space if the
                      teacher embedded the queries, or decorrelated (train.decorrelate_reading); imported encoders have
                      none
rotation.safetensors  the map to rotated embeddings, if `rotate` made the folder
start.safetensors     the student before its first step, and its reading as `reading.<name>`
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.errors import TrainingError
from pipeline.encoder.folder.config import (
    CONFIG_FILE,
    READING_FILE,
    ROTATION_FILE,
    START_FILE,
    WEIGHTS_FILE,
    EncoderConfig,
)
from pipeline.encoder.head import Reading, Rotation
from pipeline.encoder.student import Student

_OF_READING = "reading."


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; equal tensors give equal bytes."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def start_tensors(student: Student, reading: Reading) -> dict[str, Tensor]:
    """The content of `START_FILE`, on the CPU, as it is now."""
    tensors = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    return tensors | {f"{_OF_READING}{name}": value for name, value in reading.tensors().items()}


def read_student(folder: Path, config: EncoderConfig) -> Student:
    """The trained tensors of a folder; TrainingError if they are missing, damaged or of other sizes than configured."""
    file = folder / WEIGHTS_FILE
    return _student(file, _read(file), config)


def read_reading(folder: Path, config: EncoderConfig) -> Reading | None:
    """The reading in a folder; None without its file, if the response share is 1; raises as `read_student`."""
    file = folder / READING_FILE
    if not file.is_file() and config.response_share == 1:
        return None
    return _reading(file, _read(file), config)


def read_rotation(folder: Path, config: EncoderConfig) -> Rotation | None:
    """The rotation in a folder; None if its embeddings are not rotated; raises as `read_student`."""
    if config.rotated_width is None:
        return None
    file = folder / ROTATION_FILE
    tensors, width = _read(file), config.rotated_width
    shapes = Rotation(
        torch.empty(width, config.hidden), torch.empty(width), prediction=torch.empty(config.width, width)
    )
    _check_shapes(file, tensors, shapes.tensors())
    return Rotation(**tensors)


def read_start(folder: Path | None, config: EncoderConfig) -> tuple[Student, Reading]:
    """The student before its first step, and its reading.

    Raises TrainingError if the folder does not hold it, or as `read_student`.
    """
    if folder is None or not (file := folder / START_FILE).is_file():
        raise TrainingError(
            f"{folder} has no {START_FILE} (an imported encoder, or one of an older version): leave the system start "
            "out, or train again"
        )
    tensors = _read(file)
    of_reading = {name: value for name, value in tensors.items() if name.startswith(_OF_READING)}
    student = _student(file, {name: value for name, value in tensors.items() if name not in of_reading}, config)
    found = {name.removeprefix(_OF_READING): value for name, value in of_reading.items()}
    return student.eval(), _reading(file, found, config)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file} cannot be read ({error}): copy the folder again, or run the train stage") from None
    return found


def _student(file: Path, tensors: Mapping[str, Tensor], config: EncoderConfig) -> Student:
    student = Student(config.hidden, config.width, config.compression_tokens, config.thought_tokens)
    _check_shapes(file, tensors, student.state_dict())
    student.load_state_dict(tensors)
    return student


def _reading(file: Path, tensors: Mapping[str, Tensor], config: EncoderConfig) -> Reading:
    wanted = Reading.plain(config.hidden)
    if "weight" in tensors:
        made = config.hidden if config.decorrelate_reading else config.width
        wanted = Reading(wanted.mean, wanted.scale, torch.empty(3), torch.empty(made, config.hidden), torch.empty(made))
    _check_shapes(file, tensors, wanted.tensors())
    return Reading(**tensors)


def _check_shapes(file: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors.keys() | wanted.keys()):
        found, expected = (list(part[name].shape) if name in part else None for part in (tensors, wanted))
        if found != expected:
            raise TrainingError(f"{file}: {name} has shape {found}, {CONFIG_FILE} says {expected}")
