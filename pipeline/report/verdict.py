"""The first screen of the report: does the student beat its teacher and the untrained readings, and at what cost?"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluate.comparison import BASIS, Cell, Comparison, Row, best_reading

MEAN = "mean/tasks"
TEACHER = "teacher"
# Fewer queries than the paper's, by which a reader should not judge the method.
PAPER_QUERIES = 160_000


@dataclass(frozen=True)
class MeanScore:
    """A system's mean over tasks, with the interval of its difference to the student around it.

    `low` to `high` holds the student's own mean where the difference is within noise; None without an interval.
    """

    system: str
    mean: float
    low: float | None = None
    high: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer of a run.

    Attributes:
        suite: the first suite that has a mean over tasks.
        means: of the student, its teacher and the best untrained reading.
        better, worse: tasks on which the student beats both or is below either, with the interval leaving out 0.
        cautions: what a reader should not conclude.
    """

    suite: str
    tasks: int
    means: list[MeanScore]
    better: list[str]
    worse: list[str]
    uncompared: list[str]
    seconds: float
    cautions: list[str]

    @property
    def sentence(self) -> str:
        """The means in words."""
        student, *others = self.means
        parts = [f"{_named(other.system)} {other.mean:.3f} (the student is {_relation(other)})" for other in others]
        tasks = f"{self.tasks} task{'s' if self.tasks != 1 else ''} of {self.suite}"
        return f"Mean over {tasks}: the student {student.mean:.3f}; {'; '.join(parts)}"

    @property
    def lines(self) -> list[str]:
        """Where the student is better and worse, in words."""
        others = ["its teacher" if mean.system == TEACHER else mean.system for mean in self.means[1:]]
        found = {f"Better than {' and '.join(others)}": self.better, f"Worse than {' or '.join(others)}": self.worse}
        if self.uncompared:
            found |= {"Not compared by an interval": self.uncompared}
        return [f"{words} on {', '.join(tasks) or 'no task'}" for words, tasks in found.items()]


def verdict(suites: Sequence[Comparison], seconds: float, queries: int | None) -> Verdict | None:
    """The verdict of a run; None without a suite that has a mean of a student and of something beside it.

    `seconds` is what all stages took, `queries` the number of training queries.
    """
    for table in suites:
        row = next((row for row in table.rows if row.metric == MEAN), None)
        means = [] if row is None else _means(table, row)
        if row is not None and len(means) > 1:
            tasks = _tasks(table, [mean.system for mean in means[1:]])
            cautions = [*_without_mean(table, row), *_cautions(queries, table)]
            return Verdict(table.name, len(table.tasks), means, *tasks, seconds, cautions)
    return None


def _means(table: Comparison, row: Row) -> list[MeanScore]:
    cells = dict(zip(table.systems, row.cells, strict=True))
    student = cells.pop(BASIS, None)
    if student is None or student.score is None:
        return []
    chosen = [(name, cells[name]) for name in (TEACHER, best_reading(cells)) if name is not None and name in cells]
    # A task without a score leaves its system without a mean.
    beside = [_mean(name, cell, float(cell.score)) for name, cell in chosen if cell.score is not None]
    return [MeanScore(BASIS, float(student.score)), *beside]


def _mean(name: str, cell: Cell, mean: float) -> MeanScore:
    """The student's mean minus the ends of the difference: the interval lies around the system's own mean."""
    if cell.delta is None or cell.low is None or cell.high is None:
        return MeanScore(name, mean, verdict=cell.verdict)
    student = mean + cell.delta
    return MeanScore(name, mean, student - cell.high, student - cell.low, cell.verdict)


def _tasks(table: Comparison, systems: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    at = [table.systems.index(name) for name in systems]
    verdicts = {row.metric: {row.cells[index].verdict for index in at} for row in table.rows if not row.summary}
    better = [task for task, found in verdicts.items() if found == {"better"}]
    worse = [task for task, found in verdicts.items() if "worse" in found]
    return better, worse, [task for task, found in verdicts.items() if found <= {None, "no interval"}]


def _without_mean(table: Comparison, row: Row) -> list[str]:
    cells = dict(zip(table.systems, row.cells, strict=True))
    if TEACHER not in cells or cells[TEACHER].score is not None:
        return []
    return ["The teacher has no mean: its score of a task is undefined."]


def _cautions(queries: int | None, table: Comparison) -> list[str]:
    cautions = ["An interval covers another sample of the tasks' texts, not another training seed."]
    if queries is not None and queries < PAPER_QUERIES:
        cautions.append(f"The student was trained on {queries:,} queries; the paper's on {PAPER_QUERIES:,}.")
    if len(table.tasks) < 10:
        cautions.append(f"A benchmark has more than {len(table.tasks)} task{'s' * (len(table.tasks) != 1)}.")
    return cautions


def _named(system: str) -> str:
    return "its teacher" if system == TEACHER else f"the best untrained reading, {system},"


def _relation(other: MeanScore) -> str:
    match other.verdict:
        case "better" | "worse":
            return other.verdict
        case "within noise":
            return "within noise of it"
        case _:
            return "not compared by an interval"
