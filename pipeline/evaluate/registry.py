"""The built-in systems: how each is built, and what its name means to probes and the report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SystemEntry:
    """A built-in system.

    Attributes:
        kind: what `build.Systems` makes of it.
        teacher_space: its embeddings lie in the teacher's space; a system of another space embeds references itself.
        per_seed: one system for each of `seeds`: the name alone for the first, `<name>-<seed>` for each other.
        template: of pooling, a key of `TEMPLATES`; the mean is over the tokens from its last text on.
    """

    kind: Literal["encoder", "teacher", "pooling", "hyde"]
    teacher_space: bool = False
    per_seed: bool = False
    template: str = "text"


# In the order of tables. What the systems are: build.py and baselines.py.
BUILT_IN = {
    "student": SystemEntry("encoder", teacher_space=True),
    "teacher": SystemEntry("teacher", teacher_space=True),
    "untrained": SystemEntry("encoder", teacher_space=True, per_seed=True),
    "backbone-mean": SystemEntry("pooling"),
    "echo": SystemEntry("pooling", template="echo"),
    "hyde": SystemEntry("hyde", teacher_space=True),
}


def split_seed(name: str) -> tuple[str, int | None]:
    """The entry's name and the seed of a system `<name>-<seed>`; any other name and None."""
    base, _, seed = name.rpartition("-")
    if base in BUILT_IN and BUILT_IN[base].per_seed and seed.isdigit():
        return base, int(seed)
    return name, None


def in_teacher_space(name: str) -> bool:
    """Whether the embeddings of the system `name` lie in the teacher's space."""
    entry = BUILT_IN.get(split_seed(name)[0])
    return entry is not None and entry.teacher_space


def system_order(name: str) -> tuple[int, int, str]:
    """Sort key: built-in systems in their order, `untrained-2` after `untrained`, then other models by name."""
    base, seed = split_seed(name)
    return (list(BUILT_IN).index(base) if base in BUILT_IN else len(BUILT_IN)), -1 if seed is None else seed, name
