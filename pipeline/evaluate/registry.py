"""The built-in systems: how each is built, and what its name means to probes and the report."""

from dataclasses import dataclass
from typing import Literal

from pipeline.core.target_transform import DECORRELATE, STANDARDIZE, TransformParams


@dataclass(frozen=True)
class SystemEntry:
    """A built-in system.

    Attributes:
        kind: what `build.Systems` makes of it.
        teacher_space: its embeddings lie in the teacher's space; a system of another space embeds references itself.
        per_seed: one system for each of `seeds`: the name alone for the first, `<name>-<seed>` for each other.
        template: of pooling, a key of `TEMPLATES`; the mean is over the tokens from its last text on.
        reading: it reads the backbone, and nothing of it is trained.
        transform: of its embeddings, fitted on training queries that it has read.
    """

    kind: Literal["encoder", "start", "teacher", "pooling", "hyde"]
    teacher_space: bool = False
    per_seed: bool = False
    template: str = "text"
    reading: bool = False
    transform: TransformParams | None = None

    @property
    def embeddings(self) -> tuple[object, ...]:
        """Equal for forms of one reading, which share the embeddings of a cache and differ in their transform."""
        projected = self.kind == "encoder" and self.transform is None
        return self.kind, self.template, self.per_seed, projected


# In the order of tables. What the systems are: build.py and baselines.py.
BUILT_IN = {
    "student": SystemEntry("encoder", teacher_space=True),
    "start": SystemEntry("start", teacher_space=True),
    "teacher": SystemEntry("teacher", teacher_space=True),
    "untrained": SystemEntry("encoder", teacher_space=True, per_seed=True, reading=True),
    "untrained-standardized": SystemEntry("encoder", per_seed=True, reading=True, transform=STANDARDIZE),
    "untrained-decorrelated": SystemEntry("encoder", per_seed=True, reading=True, transform=DECORRELATE),
    "backbone-mean": SystemEntry("pooling", reading=True),
    "backbone-mean-standardized": SystemEntry("pooling", reading=True, transform=STANDARDIZE),
    "backbone-mean-decorrelated": SystemEntry("pooling", reading=True, transform=DECORRELATE),
    "echo": SystemEntry("pooling", template="echo", reading=True),
    "echo-standardized": SystemEntry("pooling", template="echo", reading=True, transform=STANDARDIZE),
    "echo-decorrelated": SystemEntry("pooling", template="echo", reading=True, transform=DECORRELATE),
    "hyde": SystemEntry("hyde", teacher_space=True),
}


def split_seed(name: str) -> tuple[str, int | None]:
    """The entry's name and the seed of a system `<name>-<seed>`; any other name and None."""
    base, _, seed = name.rpartition("-")
    if base in BUILT_IN and BUILT_IN[base].per_seed and seed.isdigit():
        return base, int(seed)
    return name, None


def entry_of(name: str) -> SystemEntry | None:
    """The entry of the system `name`, whatever its seed; None for a model of `evaluate.models`."""
    return BUILT_IN.get(split_seed(name)[0])


def is_reading(name: str) -> bool:
    """Whether the system `name` reads the backbone without any training."""
    entry = entry_of(name)
    return entry is not None and entry.reading


def system_order(name: str) -> tuple[int, int, str]:
    """Sort key: built-in systems in their order, `untrained-2` after `untrained`, then other models by name."""
    base, seed = split_seed(name)
    return (list(BUILT_IN).index(base) if base in BUILT_IN else len(BUILT_IN)), -1 if seed is None else seed, name
