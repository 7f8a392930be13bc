from pathlib import Path

import pytest

from pipeline.errors import EvaluationError, ParamsError
from pipeline.evaluation.instructions import Instructions, SideInstructions, load_instructions

SHIPPED = load_instructions()


def test_a_task_beats_its_type_and_a_side_its_default() -> None:
    instructions = Instructions(
        document="D:",
        types={"Retrieval": SideInstructions(query="T:"), "Clustering": SideInstructions(query="C:", document="CD:")},
        tasks={"ArguAna": SideInstructions(query="A:")},
    )
    assert instructions.choose("ArguAna", "Retrieval", "query") == "A:"
    assert instructions.choose("FiQA2018", "Retrieval", "query") == "T:"
    assert instructions.choose("ArguAna", "Retrieval", "document") == "D:"
    assert instructions.choose("X", "Clustering", "document") == "CD:"
    with pytest.raises(EvaluationError, match=r"task 'X' is of type 'Sorting'.*`types`.*Retrieval, Clustering"):
        instructions.choose("X", "Sorting", "query")


def test_the_digest_follows_every_instruction() -> None:
    base = Instructions(document="D:", types={}, tasks={})
    assert base.digest == Instructions(document="D:", types={}, tasks={}).digest
    assert base.digest != Instructions(document="E:", types={}, tasks={}).digest


@pytest.mark.parametrize("benchmark", ["MTEB(eng, v2)", "BRIGHT(v1.1)"])
def test_the_shipped_file_covers_the_benchmark(benchmark: str) -> None:
    import mteb

    tasks = list(mteb.get_benchmark(benchmark).tasks)
    assert len(tasks) >= 12
    for task in tasks:
        assert SHIPPED.choose(task.metadata.name, task.metadata.type, "query").startswith("Generate ")
        assert SHIPPED.choose(task.metadata.name, task.metadata.type, "document")


def test_every_task_named_in_the_shipped_file_exists_in_mteb() -> None:
    import mteb

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert set(SHIPPED.tasks) <= known
    assert SHIPPED.document == "Summarize the following passage:"


def test_a_mistake_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "instructions.yaml"
    path.write_text("document: D\ntypes:\n  STS: {querry: Q}\ntasks: {}\n")
    with pytest.raises(ParamsError, match=r"types\.STS\.querry: unknown key"):
        load_instructions(path)
