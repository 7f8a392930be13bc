from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import validate
from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.probe.sources import SourceParams, load_judged, load_passages, load_rows
from tests.evaluate.fakes import retrieval_folder, sts_folder, write_folder

REQUESTS = [
    {"ID": 7, "query": "ask one", "title": "One", "document": "text one"},
    {"ID": 8, "query": "ask two", "title": None, "document": "text two"},
]


@pytest.mark.parametrize("entry", [{}, {"local": "a", "dataset": "b/c"}])
def test_a_source_is_in_one_place(entry: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="exactly one of local and dataset"):
        validate(entry, SourceParams, where="params.yaml")


def test_a_local_source_must_have_the_layout(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "r")
    sts_folder(tmp_path / "s")
    assert load_passages(SourceParams(local="r"), tmp_path)["title"][0].as_py() == "apple"
    for load in (load_judged, load_passages):
        with pytest.raises(EvaluationError, match=r"retrieval layout|config 'corpus' missing"):
            load(SourceParams(local="s"), tmp_path)


def test_a_hub_source_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="data set 'no-one/nothing' cannot be loaded: "):
        load_judged(SourceParams(dataset="no-one/nothing", revision="main"), tmp_path)


def test_the_authors_table_of_requests_and_documents(tmp_path: Path) -> None:
    write_folder(tmp_path / "advbench", {"default": {"train": REQUESTS}})
    data = load_judged(SourceParams(local="advbench"), tmp_path)
    assert data.queries == {"7": "ask one", "8": "ask two"}
    assert data.relevant == {"7": {"7": 1}, "8": {"8": 1}}
    assert data.corpus.to_pylist() == [
        {"id": "7", "title": "One", "text": "text one"},
        {"id": "8", "title": "", "text": "text two"},
    ]


def test_the_authors_table_of_wikipedia_passages(tmp_path: Path) -> None:
    write_folder(tmp_path / "wiki", {"default": {"train": [{"ID": "1", "title": "T", "passage": "words"}]}})
    passages = load_passages(SourceParams(local="wiki"), tmp_path)
    assert passages.to_pylist() == [{"id": "1", "title": "T", "text": "words"}]


def test_a_hub_table_is_read_like_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list(REQUESTS)
    monkeypatch.setattr("mteb.abstasks.retrieval_dataset_loaders.get_dataset_config_names", lambda *_: ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    write_folder(tmp_path / "advbench", {"default": {"train": REQUESTS}})
    hub, local = (
        load_judged(source, tmp_path) for source in (SourceParams(dataset="a/b"), SourceParams(local="advbench"))
    )
    assert (hub.queries, hub.relevant) == (local.queries, local.relevant)
    assert hub.corpus.to_pylist() == local.corpus.to_pylist()
    with pytest.raises(EvaluationError, match=r"'a/b': columns \['prompt'\] missing"):
        load_rows(SourceParams(dataset="a/b"), tmp_path, ("prompt",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([REQUESTS[0], REQUESTS[0]], "an id occurs twice in the column ID"),
        ([{"ID": 1, "document": "text"}], "column 'query' missing"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_folder(tmp_path / "bad", {"default": {"train": rows}})
    with pytest.raises(EvaluationError, match=message):
        load_judged(SourceParams(local="bad"), tmp_path)


def test_several_splits_without_test_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "dev"])
    with pytest.raises(EvaluationError, match=r"'a/b' has no split 'test' \(it has dev, train\)"):
        load_rows(SourceParams(dataset="a/b"), tmp_path, ())
