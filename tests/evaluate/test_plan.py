"""What will be embedded, against the statistics that mteb ships and sums made by hand."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.evaluate.params import EvaluateParams
from pipeline.evaluate.plan import EvaluationPlan, SuiteSize, size_of
from pipeline.tasks.suites import SuiteParams, find_tasks

EVALUATE = EvaluateParams(systems=["student", "teacher"], local_dir="tasks")
LIMITS = {"max_tokens": 512, "answer_tokens": 100}


def fake_task(statistics: Any, subsets: tuple[str, ...] = ("default",)) -> Any:
    metadata = SimpleNamespace(name="fake", descriptive_stats=statistics)
    return SimpleNamespace(metadata=metadata, eval_splits=["test"], hf_subsets=list(subsets))


def column(texts: int, length: float) -> dict[str, float]:
    return {"unique_texts": texts, "average_text_length": length}


def test_sides_are_told_apart_and_long_texts_cut() -> None:
    split = {
        "num_samples": 7,
        "queries_text_statistics": column(10, 40.0),
        "documents_text_statistics": column(100, 8000.0),
        "documents_image_statistics": None,
    }
    size = size_of([fake_task({"test": split, "train": split})], max_tokens=50)
    assert size == SuiteSize(
        tasks=1, queries=10, documents=100, tokens=10 * 10 + 100 * 50, document_tokens=5000, unknown=()
    )
    assert size.texts == 110


def test_sizes_are_of_stages_with_tasks_of_mteb() -> None:
    plan = EvaluationPlan(EVALUATE, {"s": SuiteParams(tasks=["SciFact"])}, {"safety": {"local": "c", "top_k": [1]}})
    sizes = plan.sizes(512)
    assert list(sizes) == ["evaluate@s"]
    assert (sizes["evaluate@s"].queries, sizes["evaluate@s"].documents) == (300, 5183)
    assert plan.sizes(10)["evaluate@s"].document_tokens == 51830


def test_only_the_subsets_that_run_count() -> None:
    subsets = {name: {"text_statistics": column(count, 8.0)} for name, count in {"de": 1, "en": 2, "fr": 4}.items()}
    split = {"text_statistics": column(5, 8.0), "hf_subset_descriptive_stats": subsets}  # two texts are in both
    assert size_of([fake_task({"test": split}, ("de", "en", "fr"))], 512).texts == 5
    assert size_of([fake_task({"test": split}, ("de", "en"))], 512).texts == 3


def test_tasks_without_statistics_are_named() -> None:
    size = size_of([fake_task(None), fake_task({"test": {"text_statistics": column(3, 4.0)}})], 512)
    assert (size.tasks, size.texts, size.unknown) == (2, 3, ("fake",))


def test_a_real_task_is_counted_without_its_data() -> None:
    size = size_of(find_tasks([], ["SciFact", "STSBenchmark"]), 512)
    assert (size.queries, size.documents) == (300 + 1256 + 1337, 5183)
    assert find_tasks([], ["SciFact"])[0].dataset is None
    assert size_of(find_tasks([], [], "MTEB(eng, v2)"), 512).unknown == ()


def test_a_plan_of_local_folders_leaves_mteb_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    plan = EvaluationPlan(EVALUATE, {"demo": SuiteParams(local=["a", "b"])}, {"safety": {"local": "c", "top_k": [1]}})
    assert plan.lines(**LIMITS) == [
        ("evaluate@demo", "a, b", "student, teacher"),
        ("probe@safety", "local c, top_k 1", "student, teacher"),
    ]
    assert plan.remarks() == []


def test_texts_tokens_and_the_cost_of_hyde_are_told() -> None:
    suite = SuiteParams(local=["a"], tasks=["SciFact"], languages=["eng"])
    with_hyde = EVALUATE.model_copy(update={"systems": ["student", "hyde"]})
    ((_, what, _),) = EvaluationPlan(with_hyde, {"s": suite}, {}).lines(**LIMITS)
    assert re.fullmatch(
        r"a, SciFact, in eng alone; 1 mteb task: 5,483 texts, about 1,950,000 tokens a system; "
        r"hyde writes at most 30,000 tokens",
        what,
    )
    assert "hyde" not in EvaluationPlan(EVALUATE, {"s": suite}, {}).lines(**LIMITS)[0][1]


def test_a_wrong_name_is_told_before_anything_runs() -> None:
    with pytest.raises(EvaluationError, match="mteb has no task 'SciFct'"):
        EvaluationPlan(EVALUATE, {}, {"reasoning": {"tasks": ["SciFct"]}})


def test_own_instructions_are_checked_and_those_of_no_task_remarked(tmp_path: Path) -> None:
    params = EVALUATE.model_copy(update={"instructions": "mine.yaml"})
    suites = {"s": SuiteParams(local=["a"], tasks=["SciFact"])}
    with pytest.raises(ParamsError, match="mine.yaml does not exist"):
        EvaluationPlan(params, suites, {}, tmp_path)
    entries = "".join(f"  {name}: {{query: 'Q:'}}\n" for name in ("SciFact", "a", "SciFct"))
    (tmp_path / "mine.yaml").write_text(f"tasks:\n{entries}")
    plan = EvaluationPlan(params, suites, {}, tmp_path)
    assert plan.remarks() == ["evaluate.instructions: mine.yaml names SciFct, in no suite or probe"]
