"""A teacher whose vectors are mapped by the transform that was fitted on its targets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import TeacherError
from pipeline.core.target_transform import TRANSFORM_FILE, TargetTransform, load_transform
from pipeline.embed.teachers.base import Teacher

if TYPE_CHECKING:
    import numpy as np


class TransformedTeacher:
    """Gives the teacher's vectors in the space of the targets; its identity holds the transform's. See `Teacher`."""

    def __init__(self, teacher: Teacher, transform: TargetTransform) -> None:
        """Raises TeacherError if the transform was fitted on vectors of another width."""
        if teacher.width != transform.teacher_width:
            raise TeacherError(
                f"the teacher gives {teacher.width} dimensions, {TRANSFORM_FILE} was fitted on "
                f"{transform.teacher_width}: run embed and train again"
            )
        self._teacher, self._transform, self.width = teacher, transform, transform.width
        self.identity: dict[str, Any] = {**teacher.identity, "transform": transform.identity}

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        return self._transform(self._teacher.embed(texts))

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_counts`."""
        return self._teacher.token_counts(texts)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """See `Teacher.truncated`."""
        return self._teacher.truncated(texts)


def in_trained_space(teacher: Teacher, encoder: Path) -> Teacher:
    """The teacher in the space of an encoder folder's targets; itself where they were not transformed.

    Raises:
        TeacherError: the folder's transform is damaged, or was fitted on vectors of another width.
    """
    transform = load_transform(encoder)
    return teacher if transform is None else TransformedTeacher(teacher, transform)
