"""Which instruction the student gets on which side of which task (`instructions.yaml`).

A student embeds the answer to its input, so an instruction says what the language model should write. The more specific
entry wins: task name, then task type. A file of the user with some of the same keys changes single entries.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.core.config import Params, load
from pipeline.core.errors import EvaluationError
from pipeline.core.files import digest_of

# Which side of a comparison a text is on; both sides of a symmetric one are queries.
Side = Literal["query", "document"]

INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.yaml")


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
        """The instruction for one side of a task; raises EvaluationError without one for the task or its type."""
        entry = self._entry(task, task_type)
        if entry is None:
            raise EvaluationError(
                f"task '{task}' is of type '{task_type}', which has no instruction: name a file with '{task}' under "
                f"`tasks` or '{task_type}' under `types` (known types: {', '.join(self.types)})",
                argument="instructions",
            )
        if side == "query":
            return entry.query
        return self.document if entry.document is None else entry.document

    def check(self, task_types: Mapping[str, str]) -> None:
        """Raises EvaluationError with all of the tasks (name -> type) that have no instruction."""
        lacking = [f"{task} ({kind})" for task, kind in task_types.items() if self._entry(task, kind) is None]
        if lacking:
            raise EvaluationError(
                f"{len(lacking)} of {len(task_types)} tasks have no instruction: {', '.join(lacking)}: name a file "
                "that has them under `tasks`, or their types under `types`",
                argument="instructions",
            )

    def merged(self, changes: "InstructionChanges") -> "Instructions":
        """These instructions with the entries of `changes` in place of those of the same name."""
        return Instructions(
            document=self.document if changes.document is None else changes.document,
            types={**self.types, **changes.types},
            tasks={**self.tasks, **changes.tasks},
        )

    @property
    def digest(self) -> str:
        """sha256 (hex) of all instructions: scores made with others are not comparable."""
        return digest_of(self.model_dump())

    def _entry(self, task: str, task_type: str) -> SideInstructions | None:
        return self.tasks.get(task) or self.types.get(task_type)


class InstructionChanges(Params):
    """A user's file: an entry replaces the shipped one of the same name, the others stay."""

    document: str | None = None
    types: dict[str, SideInstructions] = Field(default_factory=dict)
    tasks: dict[str, SideInstructions] = Field(default_factory=dict)


def load_instructions(override: Path | None = None, *, shipped: Path = INSTRUCTIONS_FILE) -> Instructions:
    """The shipped instructions, with the entries of the user's file `override` in place of its own.

    Raises:
        ParamsError: a file is missing, or with one line for each mistake in it.
    """
    instructions = load(shipped, Instructions, whole_file=True)
    return instructions if override is None else instructions.merged(read_changes(override))


def read_changes(path: Path) -> InstructionChanges:
    """A user's instructions file; raises ParamsError as `load_instructions`."""
    return load(path, InstructionChanges, whole_file=True)
