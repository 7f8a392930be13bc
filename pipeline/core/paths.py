"""The teacher that the stage teach trains: how params ask for it, and where it lies."""

from pathlib import Path
from typing import Final

TRAINED: Final = "llm2vec-trained"  # embed.teacher.kind
TRAINED_TEACHER = Path("models/teacher")
