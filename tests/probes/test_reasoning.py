import math
from pathlib import Path

import pytest

from pipeline.errors import EvaluationError, ParamsError
from pipeline.params import validate
from pipeline.probes.reasoning import ReasoningParams, run
from tests.evaluation_fakes import VectorSystem, WordSystem, retrieval_folder, sts_folder, write_folder
from tests.probes.test_safety import context


def test_scores_are_ndcg_at_10_of_each_system(tmp_path: Path) -> None:
    rows = {
        "corpus": {"corpus": [{"_id": "a", "text": "principle"}, {"_id": "b", "text": "lookalike"}]},
        "queries": {"queries": [{"_id": "q", "text": "riddle"}]},
        "default": {"test": [{"query-id": "q", "corpus-id": "a", "score": 1}]},
    }
    write_folder(tmp_path / "riddles", rows)
    student = VectorSystem({"riddle": [1, 0], "principle": [1, 0], "lookalike": [0, 1]})
    teacher = VectorSystem({"riddle": [0, 1], "principle": [1, 0], "lookalike": [0, 1]}, "teacher")
    result = run(ReasoningParams(local=["riddles"]), context(tmp_path, [student, teacher]))
    second_place = 1 / math.log2(3)
    assert result.metrics["student/riddles"] == 1.0
    assert result.metrics["teacher/riddles"] == pytest.approx(second_place, abs=1e-5)
    assert result.metrics["gain_percent"] == pytest.approx(100 * (1 - second_place) / second_place, abs=0.01)
    assert set(result.rows["metric"].to_pylist()) == {"ndcg_at_10"}
    assert set(result.systems) == {"student", "teacher"}


def test_only_retrieval_is_taken(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "r")
    sts_folder(tmp_path / "s")
    with pytest.raises(EvaluationError, match=r"retrieval tasks only, not s \(STS\)"):
        run(ReasoningParams(local=["r", "s"]), context(tmp_path, [WordSystem()]))


def test_bright_tasks_are_known_by_name_and_their_data_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="BrightBiologyRetrieval: mteb/BRIGHT"):
        run(ReasoningParams(tasks=["BrightBiologyRetrieval"]), context(tmp_path, [WordSystem()]))


def test_no_task_at_all_is_refused() -> None:
    with pytest.raises(ParamsError, match="names no task"):
        validate({"local": [], "tasks": []}, ReasoningParams, where="params.yaml")
