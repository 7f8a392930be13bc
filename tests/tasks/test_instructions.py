from pathlib import Path

import pytest

from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.tasks.instructions import Instructions, SideInstructions, load_instructions

SHIPPED = load_instructions()


def test_a_task_beats_its_type_and_a_side_its_default() -> None:
    instructions = Instructions(
        document="D:",
        types={"Retrieval": SideInstructions(query="T:"), "Clustering": SideInstructions(query="C:", document="CD:")},
        tasks={"ArguAna": SideInstructions(query="A:"), "Bare": SideInstructions(query="", document="")},
    )
    assert instructions.choose("ArguAna", "Retrieval", "query") == "A:"
    assert instructions.choose("FiQA2018", "Retrieval", "query") == "T:"
    assert instructions.choose("ArguAna", "Retrieval", "document") == "D:"
    assert instructions.choose("X", "Clustering", "document") == "CD:"
    assert instructions.choose("Bare", "Retrieval", "document") == ""
    with pytest.raises(EvaluationError, match=r"task 'X' is of type 'Sorting'.*`types`.*Retrieval, Clustering"):
        instructions.choose("X", "Sorting", "query")


def test_all_tasks_without_an_instruction_are_named_at_once() -> None:
    SHIPPED.check({"SciFact": "Nothing", "Anything": "STS"})
    with pytest.raises(EvaluationError, match=r"2 of 3 tasks have no instruction: A \(Sorting\), C \(Guessing\)"):
        SHIPPED.check({"A": "Sorting", "B": "STS", "C": "Guessing"})


def test_the_digest_follows_every_instruction() -> None:
    base = Instructions(document="D:", types={}, tasks={})
    assert base.digest == Instructions(document="D:", types={}, tasks={}).digest
    assert base.digest != Instructions(document="E:", types={}, tasks={}).digest


def test_every_task_named_in_the_shipped_file_exists_in_mteb() -> None:
    import mteb

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert set(SHIPPED.tasks) <= known


def test_a_users_file_changes_its_entries_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tasks:\n  SciFact: {query: 'Q:', document: 'D:'}\n  my-folder: {query: 'M:'}\n")
    merged = load_instructions(path)
    assert [merged.choose("SciFact", "Retrieval", side) for side in ("query", "document")] == ["Q:", "D:"]
    assert merged.choose("my-folder", "Retrieval", "query") == "M:"
    assert merged.choose("my-folder", "Retrieval", "document") == SHIPPED.document
    assert merged.choose("ArguAna", "Retrieval", "query") == SHIPPED.choose("ArguAna", "Retrieval", "query")
    assert merged.types == SHIPPED.types
    assert merged.digest != SHIPPED.digest
    path.write_text("document: 'Z:'\ntypes: {Sorting: {query: 'S:'}}\n")
    merged = load_instructions(path)
    assert merged.choose("X", "Sorting", "document") == merged.choose("SciFact", "Retrieval", "document") == "Z:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("types:\n  STS: {querry: Q}\n", r"mine.yaml: types\.STS\.quer+y: (.|\n)*unknown key"),
        ("task: {}\n", "mine.yaml: task: unknown key .did you mean 'tasks'"),
        ("tasks: {SciFact: 3}\n", "mine.yaml: tasks.SciFact: "),
        ("- a\n", "must be a mapping"),
        (None, "mine.yaml does not exist"),
    ],
)
def test_a_mistake_in_a_users_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ParamsError, match=message):
        load_instructions(path)
