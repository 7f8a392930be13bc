"""The student in fewer dimensions or bits: by hand, from embeddings that are there already."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.bootstrap import Delta
from pipeline.encoder.storage import Storage
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.run import run_systems
from pipeline.evaluate.stored import StoredSystem, name_of, stored_facts, with_stored
from pipeline.evaluate.system import System, innermost, revision_of
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.local_tasks import local_task
from tests.evaluate.fakes import VectorSystem, WordSystem

VECTORS = {"a": [3.0, 4.0, -1.0], "b": [-3.0, 4.0, 2.0], "c": [0.0, -4.0, 1.0]}
INT8 = Storage(quantize="int8")


def test_what_is_compared_is_what_is_stored() -> None:
    student = VectorSystem(VECTORS)
    cut = StoredSystem(student, Storage(truncate_dim=2))
    np.testing.assert_allclose(cut.encode(["a", "c"], ""), [[0.6, 0.8], [0, -1]], rtol=1e-6)
    signs = StoredSystem(student, Storage(quantize="binary"))
    assert signs.encode(["a", "b"], "").tolist() == [[1, 1, -1], [-1, 1, 1]]
    assert innermost(cut) is student
    assert len({revision_of(system) for system in (student, cut, signs)}) == 3


def test_ranges_are_those_of_all_texts_of_a_task() -> None:
    system = StoredSystem(VectorSystem(VECTORS), INT8)
    system.calibrate(lambda: [system.encode([text], "") for text in VECTORS] + [system.encode(["a"], "")])
    # Ranges of 6, 8 and 3 in 255 steps, each known by its middle.
    found = system.encode([*VECTORS], "")
    np.testing.assert_allclose(found, [*VECTORS.values()], atol=8 / 255)
    assert np.abs(found - [*VECTORS.values()]).max() > 0
    system.calibrate(lambda: system.encode(["a", "c"], ""))  # another task, from 0 to 3
    np.testing.assert_allclose(system.encode(["b"], "")[0, 0], 0, atol=3 / 255)


def test_names() -> None:
    assert [name_of(storage) for storage in (Storage(), Storage(96), INT8, Storage(96, "binary"))] == [
        "student", "student-96", "student-int8", "student-96-binary",
    ]  # fmt: skip


def test_forms_stand_behind_the_student_while_it_is_there() -> None:
    closed = []

    def build() -> Iterator[System]:
        for name in ("teacher", "student", "echo"):
            yield VectorSystem(VECTORS, name)
            closed.append(name)

    found = [(system.name, list(closed)) for system in with_stored(build(), [Storage(2), INT8])]
    assert found == [
        ("teacher", []),
        ("student", ["teacher"]),
        ("student-2", ["teacher"]),
        ("student-int8", ["teacher"]),
        ("echo", ["teacher", "student"]),
    ]


def test_nothing_is_embedded_a_second_time(folders: list[Path], tmp_path: Path) -> None:
    student = WordSystem()
    cached = CachedSystem(student, tmp_path / "embeddings")
    tasks = [local_task(folder) for folder in folders]
    systems = with_stored([cached], [Storage(truncate_dim=8), INT8, Storage(quantize="binary"), Storage(1)])
    runs = run_systems(systems, tasks, load_instructions(), work=tmp_path / "work", dtype="float32")
    cached.close()
    texts = [text for _, some in student.calls for text in some]
    assert len(texts) == len(set(texts))
    scores = {run.system: [round(result.get_score(), 3) for result in run.results] for run in runs}
    # One-hot vectors survive everything but the loss of seven dimensions.
    whole = scores["student"]
    assert scores == {
        "student": whole,
        "student-8": whole,
        "student-int8": whole,
        "student-binary": whole,
        "student-1": scores["student-1"],
    }
    assert scores["student-1"][0] < whole[0] == 1


def test_the_record_says_what_a_million_vectors_take() -> None:
    delta = Delta("mean/tasks", "student-int8", 0.03, 0.02, 0.04, "better", 30)
    metrics = {"student/mean/tasks": 0.6, "student-int8/mean/tasks": 0.59}
    whole, small = stored_facts([INT8], 384, metrics, [delta])
    assert whole == {
        "stored": "float32", "dimensions": 384, "bytes_per_million": 1_536_000_000, "scores": {"mean/tasks": 0.6},
        "deltas": [],
    }  # fmt: skip
    assert (small["stored"], small["bytes_per_million"]) == ("int8", 384_000_000)
    assert small["scores"] == {"mean/tasks": 0.59}
    lost = small["deltas"][0]
    assert (lost["delta"], lost["low"], lost["high"], lost["verdict"]) == (-0.03, -0.04, -0.02, "worse")


@pytest.mark.parametrize("storage", [Storage(quantize="binary"), Storage(truncate_dim=2)])
def test_only_eight_bits_need_a_first_pass(storage: Storage) -> None:
    StoredSystem(VectorSystem(VECTORS), storage).calibrate(lambda: pytest.fail("read"))
