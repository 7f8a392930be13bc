"""Every error that is the user's to fix. A stage prints its message without a traceback and exits with 1.

A component knows its own arguments and nothing of params.yaml. It raises an error about an argument by name, and its
callers say where that argument stands:

    raise TrainingError("r (0) must be at least 1", argument="r")     # backbone/lora.py
    with nested_in("lora"): add_adapter(model, params.lora)            # train/build.py
    with section("train"): assemble(params, ...)                       # train/__main__.py

prints `error: train.lora.r: r (0) must be at least 1`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class PipelineError(Exception):
    """Base of all errors whose message is written for the user.

    Args:
        message: what is wrong, with the value and the limit.
        argument: the raising component's own argument that must change, dotted where it lies in another.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.argument = argument
        self.section: str | None = None

    def __str__(self) -> str:
        """The message, behind the key of the argument."""
        key = ".".join(part for part in (self.section, self.argument) if part)
        return f"{key}: {self.message}" if self.argument else self.message


@contextmanager
def nested_in(name: str = "", names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors about an argument `x` raised inside are about `<name>.x`, or about `names["x"]` where that is given."""
    try:
        yield
    except PipelineError as error:
        if error.argument and error.section is None:
            known = (names or {}).get(error.argument)
            error.argument = known or ".".join(part for part in (name, error.argument) if part)
        raise


@contextmanager
def section(name: str) -> Iterator[None]:
    """Errors about an argument raised inside are about a key of the section `name`; the innermost section holds."""
    try:
        yield
    except PipelineError as error:
        if error.argument and error.section is None:
            error.section = name
        raise


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type, if the message is empty, as those of time-outs often are."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ParamsError(PipelineError):
    """params.yaml has unknown, missing or mistyped keys (all of them in one message), or keys that conflict."""


class SourceError(PipelineError):
    """A file or data set of texts cannot be read or has none."""


class ArtifactError(PipelineError):
    """An artifact of a stage is missing, damaged or of another format version."""


class ContractError(ArtifactError):
    """A table breaks the schema or the key that stages rely on."""


class DeviceMemoryError(PipelineError):
    """The memory of a GPU, or of the machine, is full."""


class WorkError(PipelineError):
    """The work directory is locked by another process, or the disk is full."""


class BusyError(WorkError):
    """The work directory is locked by another process."""


class BackboneError(PipelineError):
    """The backbone or its tokenizer cannot be used."""


class EngineError(PipelineError):
    """Generation failed, or too many of its rows did."""


class TeacherError(PipelineError):
    """The teacher cannot be loaded, or gives unusable embeddings."""


class TrainingError(PipelineError):
    """The student cannot be trained or loaded."""


class EvaluationError(PipelineError):
    """A task, an instruction or a data set of an evaluation is missing."""
