"""Every text that an evaluation reads, and no id or label of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import EvaluationError
from pipeline.tasks import texts
from pipeline.tasks.suites import SuiteParams
from pipeline.tasks.texts import find_texts
from tests.conftest import ROOT
from tests.evaluate.fakes import classification_folder, retrieval_folder, sts_folder, write_folder


def all_texts(sources: list[texts.TextSource]) -> dict[str, list[str]]:
    return {source.name: [text for batch in source.batches() for text in batch] for source in sources}


def test_local_folders_of_every_layout(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "r", extra=["nobody's"])
    sts_folder(tmp_path / "s")
    classification_folder(tmp_path / "c")
    found = all_texts(find_texts({"suite": SuiteParams(local=["r", "s", "c"])}, {}, tmp_path))
    assert set(found["r"]) >= {"apple what is it?", "is a word", "apple", "nobody's"}
    assert not {text for text in found["r"] if text.startswith(("q-", "d-"))}
    assert {"apple one", "bread two"} <= set(found["s"])
    assert (len(found["s"]), len(found["c"])) == (32, 48)
    assert not {"apple", "bread"} & set(found["c"])  # labels


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_formats_and_many_rows(tmp_path: Path, suffix: str) -> None:
    import polars as pl

    rows = [{"text": f"text {index}", "label": "a"} for index in range(5000)]
    folder = write_folder(tmp_path / "c", {"default": {"train": rows}})
    getattr(pl.DataFrame(rows), f"write_{suffix}")(folder / "default" / f"train.{suffix}")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace(".jsonl", f".{suffix}"))
    (source,) = find_texts({}, {"probe": {"local": "c"}}, tmp_path)
    batches = list(source.batches())
    assert max(map(len, batches)) < 5000
    assert sorted(text for batch in batches for text in batch) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_texts_that_begin_after_many_rows_count(tmp_path: Path, suffix: str) -> None:
    """Types are not guessed from the first hundred rows."""
    import polars as pl

    rows = [{"text": str(row), "title": None} for row in range(150)] + [{"text": "words", "title": "a title"}]
    folder = write_folder(tmp_path / "c", {"default": {"train": rows}})
    if suffix == "csv":
        pl.DataFrame(rows, infer_schema_length=None).write_csv(folder / "default" / "train.csv")
        readme = folder / "README.md"
        readme.write_text(readme.read_text().replace(".jsonl", ".csv"))
    (source,) = find_texts({}, {"probe": {"local": "c"}}, tmp_path)
    assert {"words", "a title"} <= {text for batch in source.batches() for text in batch}


@pytest.mark.parametrize("data", [{}, [{"text": "in a list"}], {"test": {"queries": {"q1": "in a dict"}}}])
def test_data_without_a_text_that_is_understood_is_an_error(data: object) -> None:
    with pytest.raises(EvaluationError, match="SomeTask: no text was found in its data"):
        list(texts._loaded(lambda: data, "SomeTask"))


def test_a_folder_counts_once_and_has_its_revision(tmp_path: Path) -> None:
    folder = sts_folder(tmp_path / "s")
    suites = {"one": SuiteParams(local=["s"]), "two": SuiteParams(local=["s"])}
    (source,) = find_texts(suites, {"probe": {"local": ["s"]}}, tmp_path)
    assert source.revision == texts.LocalData(folder).revision


def test_probes_name_data_on_any_level(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        sts_folder(tmp_path / name)
    probes = {
        "alignment": {},
        "safety": {"local": "a", "dataset": None, "harmless": {"local": "b"}, "top_k": [1, 5]},
        "reasoning": {"local": ["c"], "tasks": []},
    }
    assert [source.name for source in find_texts({}, probes, tmp_path)] == ["a", "b", "c"]


def test_a_folder_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such folder"):
        find_texts({}, {"probe": {"local": "gone"}}, tmp_path)
    folder = sts_folder(tmp_path / "s")
    (folder / "default" / "test.jsonl").write_text("{not json\n")
    (source,) = find_texts({}, {"probe": {"local": "s"}}, tmp_path)
    with pytest.raises(EvaluationError, match=r"test\.jsonl, line 1: "):
        list(source.batches())


class FakeTask:
    """An mteb task."""

    def __init__(self, name: str, dataset: Any, parts: list[Any] | None = None) -> None:
        self.metadata = SimpleNamespace(name=name, dataset={"path": name, "revision": "r1"}, tasks=parts)
        self.dataset, self._data = None, dataset

    def load_data(self) -> None:
        if isinstance(self._data, Exception):
            raise self._data
        self.dataset = self._data

    def unload_data(self) -> None:
        self.dataset = None


def tasks_of(monkeypatch: pytest.MonkeyPatch, *tasks: FakeTask) -> list[texts.TextSource]:
    monkeypatch.setattr(texts, "find_tasks", lambda local, names, benchmark, languages: list(tasks))
    return find_texts({"suite": SuiteParams(benchmark="B")}, {}, Path())


def test_mteb_tasks_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    corpus = Dataset.from_dict({"id": ["1", "2", "3"], "title": ["t1", "", "t3"], "text": ["one", "two", "three"]})
    retrieval = {
        "corpus": corpus.select([0, 2]),
        "queries": Dataset.from_dict({"id": ["q"], "text": ["asked"]}),
        "relevant_docs": {"q": {"1": 1}},
        "top_ranked": None,
    }
    clusters = Dataset.from_dict({"sentences": [["a", "b"], ["c"]], "labels": [["x", "y"], ["z"]]})
    chats = Dataset.from_dict({"query": [[{"role": "user", "content": "hi"}]], "score": [1.0]})
    part = FakeTask("part", {"id": DatasetDict({"test": Dataset.from_dict({"text": ["in Indonesian"]})})})
    found = tasks_of(
        monkeypatch,
        FakeTask("retrieval", {"default": {"test": retrieval}}),
        FakeTask("clustering", DatasetDict({"test": clusters})),
        FakeTask("chats", DatasetDict({"test": chats})),
        FakeTask("many", None, parts=[part]),
    )
    assert all_texts(found) == {
        "retrieval": ["t1", "t3", "one", "three", "asked"],
        "clustering": ["a", "b", "c"],
        "chats": ["hi"],
        "part": ["in Indonesian"],
    }
    assert part.dataset is None


def test_only_the_languages_of_a_suite_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def none(*arguments: Any) -> list[Any]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(texts, "find_tasks", none)
    find_texts({"suite": SuiteParams(tasks=["STS17"], languages=["deu"])}, {"probe": {"tasks": ["A"]}}, Path())
    assert asked == [([], ["STS17"], None, ["deu"]), ([], ["A"], None, None)]


@pytest.mark.parametrize("problem", [ConnectionError("no hub"), ValueError("no cache"), RuntimeError("")])
def test_a_task_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    (source,) = tasks_of(monkeypatch, FakeTask("STS13", problem))
    with pytest.raises(EvaluationError, match=f"STS13: {problem or 'RuntimeError'}"):
        list(source.batches())


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = retrieval_folder(tmp_path / "data")
    (source,) = find_texts({}, {"safety": {"dataset": str(folder), "revision": None}}, tmp_path)
    (found,) = all_texts([source]).values()
    datasets.enable_progress_bars()
    assert {"apple what is it?", "is a word", "apple"} == {
        text for text in found if "a" in text[:1] or text == "is a word"
    }


READ = """
import json, sys
from pathlib import Path
from pipeline.tasks.suites import SuiteParams
from pipeline.tasks.texts import find_texts
sources = find_texts({"s": SuiteParams(tasks=json.loads(sys.argv[1]))}, {"p": {"dataset": sys.argv[2]}}, Path())
print(json.dumps({s.name: [sum(len(b) for b in s.batches()), s.revision] for s in sources}))
"""


@pytest.mark.realdata
@pytest.mark.slow
def test_real_mteb_tasks(real_data: Path, tmp_path: Path) -> None:
    script = real_data.parent / "tools" / "install_datasets_cache.py"
    if not script.is_file():
        pytest.skip(f"{script.name} is not beside the real data")
    subprocess.run([sys.executable, script, real_data / "hub", tmp_path], check=True, capture_output=True)
    names = ["STSBenchmark", "Banking77Classification", "SciFact"]
    advbench = real_data / "hub" / "McGill-NLP" / "AdvBench-IR-chunked"
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(names), str(advbench)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["STSBenchmark"][0] >= 2 * 1379
    assert found["Banking77Classification"][0] >= 3080
    assert found["SciFact"][0] == 2 * 5183 + 300
    assert found[str(advbench)][0] >= 1796 + 520
    assert all(revision for name, (_, revision) in found.items() if name in names)
