"""Suites by name, of which no task may lack an instruction."""

from pathlib import Path

import pytest

from pipeline.core.config import read_yaml, validate
from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import SuiteParams, find_tasks, named_suites
from tests.conftest import ROOT

SHIPPED = load_instructions()
ENGLISH = "MTEB(eng, v2)"
# Tasks that have no entry of their own because their type's says all there is to say.
BY_TYPE = {
    *("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS17", "STS22.v2", "STSBenchmark"),
    "SummEvalSummarization.v2",
}


def shipped_suites() -> list[tuple[list[str], str | None]]:
    """(tasks, benchmark) of each suite and probe with mteb tasks in the params files."""
    found: list[tuple[list[str], str | None]] = []
    for file in ("params.yaml", "params.demo.yaml"):
        params = read_yaml(ROOT / file)
        entries = [*params["suites"].values(), *params["probes"].values()]
        found += [(entry.get("tasks", []), entry.get("benchmark")) for entry in entries]
    return [(tasks, benchmark) for tasks, benchmark in found if tasks or benchmark]


@pytest.mark.parametrize(
    ("tasks", "benchmark"),
    [
        *(([], name) for name in (ENGLISH, "BRIGHT", "BRIGHT(v1.1)", "MTEB(Multilingual, v2)", *named_suites())),
        *(([], name) for name in ("MTEB(Europe, v1)", "MTEB(deu, v1)", "MTEB(cmn, v1)", "BEIR", "CoIR", "FollowIR")),
        *shipped_suites(),
    ],
)
def test_no_task_of_a_suite_lacks_an_instruction(tasks: list[str], benchmark: str | None) -> None:
    found = find_tasks([], tasks, benchmark)
    SHIPPED.check({task.metadata.name: task.metadata.type for task in found})
    for task in found:
        for side in ("query", "document"):
            chosen = SHIPPED.choose(task.metadata.name, task.metadata.type, side)
            assert chosen.endswith(":") and chosen == chosen.strip()


def test_every_type_of_text_task_has_an_instruction() -> None:
    import mteb

    tasks = mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True, exclude_superseded=False)
    assert {task.metadata.type for task in tasks} == set(SHIPPED.types)


def test_the_41_tasks_read_as_the_paper_says() -> None:
    tasks = find_tasks([], [], ENGLISH)
    assert len(tasks) == 41
    for task in tasks:
        name, kind = task.metadata.name, task.metadata.type
        assert SHIPPED.choose(name, kind, "query").startswith("Generate "), name
        assert SHIPPED.choose(name, kind, "document") == "Summarize the following passage:", name
    assert {task.metadata.name for task in tasks} - set(SHIPPED.tasks) == BY_TYPE


def test_the_lite_suite_has_ten_tasks_as_the_whole_one_runs_them() -> None:
    lite = find_tasks([], [], "MTEB-Lite")
    assert len({task.metadata.name for task in lite}) == 10
    whole = {task.metadata.name: task for task in find_tasks([], [], ENGLISH)}
    for task in lite:
        same = whole[task.metadata.name]
        assert (task.hf_subsets, task.eval_splits) == (same.hf_subsets, same.eval_splits)
    assert next(task for task in lite if task.metadata.name == "STS17").hf_subsets == ["en-en"]
    types = {task.metadata.type for task in lite}
    assert {task.metadata.type for task in whole.values()} - types == {"Summarization"}


def test_a_list_of_ours_hides_none_of_mteb() -> None:
    import mteb

    assert not set(named_suites()) & {benchmark.name for benchmark in mteb.get_benchmarks()}


def test_languages_choose_subsets_and_leave_the_shared_task_alone() -> None:
    (german,) = find_tasks([], ["STS22.v2"], languages=["deu"])
    assert german.hf_subsets == ["de"]
    (both,) = find_tasks([], ["STS22.v2"], languages=["deu", "eng"])
    assert sorted(both.hf_subsets) == ["de", "de-en", "en"]
    multilingual = find_tasks([], [], "MTEB(Multilingual, v2)")
    before = {task.metadata.name: list(task.hf_subsets) for task in multilingual}
    fewer = find_tasks([], [], "MTEB(Multilingual, v2)", ["deu", "eng"])
    assert 0 < len(fewer) < len(multilingual)
    for task in fewer:
        assert 0 < len(task.hf_subsets) <= len(before[task.metadata.name])
    assert {
        task.metadata.name: list(task.hf_subsets) for task in find_tasks([], [], "MTEB(Multilingual, v2)")
    } == before


def test_languages_keep_a_benchmarks_own_choice_of_subsets() -> None:
    sts17 = next(task for task in find_tasks([], [], "MTEB-Lite", ["eng", "deu"]) if task.metadata.name == "STS17")
    assert sts17.hf_subsets == ["en-en"]


@pytest.mark.parametrize(
    ("names", "benchmark", "languages", "message"),
    [
        (["STSBenchmrk"], None, None, r"mteb has no task 'STSBenchmrk': .*STSBenchmark"),
        ([], "MTEB(eng, v9)", None, r"mteb has no benchmark 'MTEB\(eng, v9\)'.*MTEB-Lite"),
        (["STS12", "STS12"], None, None, "named twice in one suite: STS12"),
        (["STS12"], None, ["deu"], "no subset of tasks is in deu alone"),
        (["STS12"], None, ["german"], "'german' is no ISO 639-3 code"),
        ([], "MIEB(Img)", None, r"tasks are not about text alone:\n  .*\(image\)"),
        (["STS12", "BeijingOpera"], None, None, r"1 of 2 tasks are not about text alone:\n  BeijingOpera \(audio\)"),
    ],
)
def test_what_cannot_run_is_refused(
    names: list[str], benchmark: str | None, languages: list[str] | None, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        find_tasks([], names, benchmark, languages)


@pytest.mark.parametrize(
    ("entry", "message"), [({}, "names no task"), ({"tasks": ["A"], "languages": []}, "languages")]
)
def test_a_suite_that_says_nothing_is_refused(entry: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        validate(entry, SuiteParams, where="params.yaml")


def test_a_task_that_its_benchmark_lost_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "suites.yaml"
    path.write_text('Mine: {benchmark: "MTEB(eng, v2)", tasks: [STS12, STS11]}')
    monkeypatch.setattr("pipeline.tasks.suites.SUITES_FILE", path)
    with pytest.raises(EvaluationError, match=r"suites.yaml: Mine: MTEB\(eng, v2\) has no task STS11"):
        find_tasks([], [], "Mine")
    path.write_text("Mine: {tasks: []}")
    with pytest.raises(ParamsError, match="Mine.benchmark: missing(.|\n)*Mine.tasks"):
        find_tasks([], [], "Mine")
