"""A teacher whose vectors are mapped by the transform that was fitted on its targets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import TeacherError
from pipeline.core.target_transform import TRANSFORM_FILE, TargetTransform, load_transform
from pipeline.embed.teachers.base import Teacher


class TransformedTeacher:
    """A `Teacher` that gives another one's vectors in the space of the targets; the transform is in its identity."""

    def __init__(self, teacher: Teacher, transform: TargetTransform) -> None:
        """Raises TeacherError if the transform was fitted on vectors of another width."""
        if teacher.width != transform.teacher_width:
            raise TeacherError(
                f"the teacher gives {teacher.width} dimensions, {TRANSFORM_FILE} was fitted on "
                f"{transform.teacher_width}: run embed and train again"
            )
        self._teacher, self._transform = teacher, transform
        self.width, self.max_tokens = transform.width, teacher.max_tokens
        self.identity: dict[str, Any] = {**teacher.identity, "transform": transform.identity}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self._transform(self._teacher.embed(texts))

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        return self._teacher.token_lengths(texts)


def in_trained_space(teacher: Teacher, encoder: Path) -> Teacher:
    """The teacher in the space of an encoder folder's targets; itself where they were not transformed.

    Raises TeacherError if the folder's transform is damaged, or was fitted on vectors of another width.
    """
    transform = load_transform(encoder)
    return teacher if transform is None else TransformedTeacher(teacher, transform)
