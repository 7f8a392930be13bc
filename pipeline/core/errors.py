"""Every error that is the user's to fix. A stage prints its message without a traceback and exits with 1.

PipelineError
├── ParamsError        params.yaml: unknown, missing or mistyped keys (all of them at once)
├── SourceError        a query source: file, column or data set missing, corpus empty
├── ArtifactError      an artifact of a stage is missing, damaged, or was made by another format version
│   └── ContractError  its table breaks the schema or the key that stages rely on
├── WorkError          the resumable work directory: locked by another process, no space left
├── BackboneError      the language model or its tokenizer cannot do what is asked of it
├── EngineError        generation failed, or too many of its rows did
├── TeacherError       the teacher cannot be loaded, or gives unusable embeddings
├── TrainingError      the student cannot be trained or loaded with these params
└── EvaluationError    a task, an instruction or a data set of an evaluation is missing
"""


class PipelineError(Exception):
    """Base of all errors whose message is written for the user."""


class ParamsError(PipelineError):
    """params.yaml does not say what it must."""


class SourceError(PipelineError):
    """A source of queries cannot be read or yields nothing."""


class ArtifactError(PipelineError):
    """An artifact is missing, damaged or of another format."""


class ContractError(ArtifactError):
    """A table breaks its contract."""


class WorkError(PipelineError):
    """The work directory cannot be used."""


class BackboneError(PipelineError):
    """The backbone or its tokenizer cannot be used."""


class EngineError(PipelineError):
    """Generation failed."""


class TeacherError(PipelineError):
    """The teacher cannot embed."""


class TrainingError(PipelineError):
    """The student cannot be trained or loaded."""


class EvaluationError(PipelineError):
    """An evaluation cannot run."""
