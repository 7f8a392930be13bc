"""Which instruction the student gets on which side of which task (`instructions.yaml`).

A student embeds the answer to its input, so an instruction says what the language model should write: "Generate a
passage that best answers this question:". The more specific entry wins: task name, then task type.
"""

from pathlib import Path
from typing import Literal

from pipeline.artifacts import digest_of
from pipeline.errors import EvaluationError
from pipeline.params import Params, load

INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.yaml")

Side = Literal["query", "document"]


class SideInstructions(Params):
    """The instructions of a task type or a task; `document` only where it differs from the file's own."""

    query: str
    document: str | None = None


class Instructions(Params):
    """The whole file: `document` is for every text that is searched or compared as a document."""

    document: str
    types: dict[str, SideInstructions]
    tasks: dict[str, SideInstructions]

    def choose(self, task: str, task_type: str, side: Side) -> str:
        """The instruction for one side of a task.

        Raises:
            EvaluationError: neither the task nor its type has one.
        """
        entry = self.tasks.get(task) or self.types.get(task_type)
        if entry is None:
            raise EvaluationError(
                f"task '{task}' is of type '{task_type}', which has no instruction: add '{task}' under `tasks` or "
                f"'{task_type}' under `types` in {INSTRUCTIONS_FILE.name} (types there: {', '.join(self.types)})"
            )
        return entry.query if side == "query" else entry.document or self.document

    @property
    def digest(self) -> str:
        """sha256 (hex) of all instructions: scores made with others are not comparable."""
        return digest_of(self.model_dump())


def load_instructions(path: Path = INSTRUCTIONS_FILE) -> Instructions:
    """Read an instructions file.

    Raises:
        ParamsError: with one line for each mistake in it.
    """
    return load(path, Instructions, whole_file=True)
