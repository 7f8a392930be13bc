from pathlib import Path

import pytest

from pipeline.core.errors import EvaluationError
from pipeline.tasks.local_dataset import LocalData
from pipeline.tasks.local_tasks import layout_of, load_retrieval, local_task
from tests.evaluate.fakes import retrieval_folder, sts_folder, write_folder


def test_the_revision_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    first, second = sts_folder(tmp_path / "a" / "x"), sts_folder(tmp_path / "b" / "y")
    assert LocalData(first).revision == LocalData(second).revision
    path = second / "default" / "test.jsonl"
    path.write_text(path.read_text().replace("5.0", "4.0", 1))
    assert LocalData(first).revision != LocalData(second).revision


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_formats_read_alike(tmp_path: Path, suffix: str) -> None:
    import polars as pl

    folder = sts_folder(tmp_path / "sts")
    frame = pl.read_ndjson(folder / "default" / "test.jsonl")
    read = {"texts": ["sentence1", "sentence2"], "numbers": ["score"]}
    expected = LocalData(folder).read("default", "test", **read)
    getattr(frame, f"write_{suffix}")(folder / "default" / f"test.{suffix}")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace(".jsonl", f".{suffix}"))
    assert LocalData(folder).read("default", "test", **read).equals(expected)


def test_a_column_that_begins_after_many_rows_is_read(tmp_path: Path) -> None:
    """Types are not guessed from the first hundred rows."""
    folder = tmp_path / "late"
    rows = [{"_id": str(row), "text": str(row)} for row in range(150)]
    titled = [{"_id": "a", "text": "some words", "title": "a title"}]
    nulls = [row | {"title": None} for row in rows]
    for early in (rows, nulls):
        write_folder(folder, {"corpus": {"test": [*early, *titled]}})
        table = LocalData(folder).read("corpus", "test", required=["text"])
        assert table["title"].to_pylist()[-1] == "a title"
        assert table["text"].to_pylist()[-1] == "some words"


@pytest.mark.parametrize(
    "readme",
    ["---\npretty_name: a --- b\n{}\n---\ntext\n---\n", "\n---  \n# -----\n{}\n---", "\ufeff---\r\n{}\r\n---\r\n"],
)
def test_hyphens_inside_the_front_matter_do_not_end_it(tmp_path: Path, readme: str) -> None:
    folder = sts_folder(tmp_path / "sts")
    configs = (folder / "README.md").read_text().split("---\n")[1].strip()
    with (folder / "README.md").open("w", newline="") as file:
        file.write(readme.format(configs))
    assert LocalData(folder).read("default", "test", required=["score"]).num_rows > 0


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (None, "README.md does not exist"),
        ("# no front matter", "must start with '---'"),
        ("---\nconfigs:\n- config_name: a\n---", "must start with '---'"),
        ("---\nconfigs: [unclosed\n---", "must start with '---'"),
        ("---\nconfigs:\n- {config_name: a, data_files: [{split: test}]}\n---", "`data_files` must be"),
        (
            "---\nconfigs:\n- {config_name: a, data_files: [{split: test, path: gone.jsonl}]}\n---",
            "gone.jsonl: no such",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_says_why(tmp_path: Path, readme: str | None, message: str) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    with pytest.raises(EvaluationError, match=message) as caught:
        LocalData(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_lists_its_neighbours(tmp_path: Path) -> None:
    sts_folder(tmp_path / "similarity")
    with pytest.raises(EvaluationError, match=r"similarty: no such folder.*there are: similarity"):
        LocalData(tmp_path / "similarty")


def test_bad_tables_are_named(tmp_path: Path) -> None:
    data = LocalData(write_folder(tmp_path / "t", {"default": {"test": [{"a": 1, "b": None}, {"a": 2, "b": 3}]}}))
    with pytest.raises(EvaluationError, match=r"config 'default', split 'test': columns 'c', 'd' missing .*'a', 'b'"):
        data.read("default", "test", required=["a", "c", "d"])
    with pytest.raises(EvaluationError, match="column 'b' has 1 empty rows"):
        data.read("default", "test", required=["b"])
    (tmp_path / "t" / "default" / "test.jsonl").write_text("{not json\n")
    with pytest.raises(EvaluationError, match=r"test\.jsonl"):
        data.read("default", "test", required=["a"])


def test_layouts_are_recognised(tmp_path: Path) -> None:
    assert layout_of(LocalData(retrieval_folder(tmp_path / "r"))) == "Retrieval"
    assert layout_of(LocalData(sts_folder(tmp_path / "s"))) == "STS"
    unknown = write_folder(tmp_path / "u", {"default": {"test": [{"question": "?", "answer": "!"}]}})
    with pytest.raises(EvaluationError, match=r"unknown layout.*\['answer', 'question'\].*sentence1") as caught:
        local_task(unknown)
    assert str(unknown) in str(caught.value)


def test_several_splits_without_test_are_refused(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1.0}]
    folder = write_folder(tmp_path / "s", {"default": {"dev": rows, "train": rows}})
    with pytest.raises(EvaluationError, match=r"no split 'test' \(it has dev, train\)"):
        local_task(folder)


def test_a_classification_needs_both_splits(tmp_path: Path) -> None:
    task = local_task(write_folder(tmp_path / "c", {"default": {"test": [{"text": "a", "label": "b"}]}}))
    with pytest.raises(EvaluationError, match=r"needs the splits train and test.*\['test'\]"):
        task.load_data()


def test_too_little_for_a_classifier_or_a_correlation_is_refused(tmp_path: Path) -> None:
    """Both are scores that the libraries below cannot compute at all."""
    rows = [{"text": text, "label": "one"} for text in "ab"]
    one_label = local_task(write_folder(tmp_path / "c", {"default": {"train": rows, "test": rows}}))
    with pytest.raises(EvaluationError, match="c: config 'default', split 'train': a classifier needs two labels"):
        one_label.load_data()
    pair = {"sentence1": "a", "sentence2": "b", "score": 1.0}
    one_pair = local_task(write_folder(tmp_path / "s", {"default": {"test": [pair]}}))
    with pytest.raises(EvaluationError, match="s: config 'default', split 'test': a correlation needs two pairs"):
        one_pair.load_data()


def test_judgements_of_unknown_ids_are_refused(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "r")
    path = folder / "default" / "test.jsonl"
    path.write_text(path.read_text().replace("d-apple", "d-pear"))
    with pytest.raises(EvaluationError, match="1 ids that config 'corpus' lacks, first: 'd-pear'"):
        load_retrieval(LocalData(folder))


def judged(folder: Path, *rows: str) -> LocalData:
    """A BEIR folder with three queries and two passages, and these judgements."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "A title", "text": "one", "metadata": {}}\n'
        '{"_id": "d2", "title": "", "text": "two", "metadata": {"url": "x"}}\n'
    )
    (folder / "queries.jsonl").write_text(
        "".join(f'{{"_id": "q{n}", "text": "{n}?", "metadata": {{}}}}\n' for n in (1, 2, 3))
    )
    for split in ("dev", "test"):
        lines = "\n".join(["query-id\tcorpus-id\tscore", *(rows if split == "test" else ("q1\td1\t1",))])
        (folder / "qrels" / f"{split}.tsv").write_text(f"{lines}\n")
    return LocalData(folder)


def test_a_folder_as_beir_is_downloaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = judged(tmp_path / "beir", "q1\td1\t1", "q1\td2\t0", "q3\td2\t2.0")
    with caplog.at_level("INFO"):
        found = load_retrieval(data)
    assert found.queries == {"q1": "1?", "q3": "3?"}
    assert found.relevant == {"q1": {"d1": 1, "d2": 0}, "q3": {"d2": 2}}
    assert found.corpus.to_pydict() == {"id": ["d1", "d2"], "title": ["A title", ""], "text": ["one", "two"]}
    assert "beir: 1 of 3 queries have no judgement and are left out, first 'q2'" in caplog.text
    assert layout_of(data) == "Retrieval"
    first = data.revision
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    assert data.revision != first
    task = local_task(tmp_path / "beir")
    assert task.metadata.eval_splits == ["test"]
    task.load_data()
    assert task.dataset["default"]["test"]["relevant_docs"] == {"q1": {"d1": 0}}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["q1\td1\t1", "q2\td2\t0.9"], r"row 1: the score 0\.9 of 'q2' and 'd2': relevance must be a whole number"),
        (["q1\td1\tnan"], "row 0: the score nan"),
        (["q1\td1\tyes"], "column 'score', row 0: 'yes' is no number"),
        (["q1\td1\t1", "q1\td1\t1"], "row 1: 'q1' and 'd1' are judged a second time"),
        (["q1\td1\t1", "q1\td1\t0"], "row 1: 'q1' and 'd1' are judged a second time"),
        (["q1\td9\t1"], "judgements name 1 ids that config 'corpus' lacks, first: 'd9'"),
        (["q9\td1\t1"], "judgements name 1 ids that config 'queries' lacks, first: 'q9'"),
        (["q1\td1"], "line 2: 2 fields, but the header has 3"),
    ],
)
def test_judgements_that_mean_nothing_are_refused(tmp_path: Path, rows: list[str], problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem):
        load_retrieval(judged(tmp_path / "beir", *rows))


def test_a_text_of_a_task_is_a_text(tmp_path: Path) -> None:
    """In CSV "007" is no number, and "NA" no null."""
    folder = retrieval_folder(tmp_path / "r")
    (folder / "corpus" / "corpus.csv").write_text("_id,text\n007,NA\n7,1\n")
    (folder / "queries" / "queries.csv").write_text("_id,text\n1,true\n")
    (folder / "default" / "test.csv").write_text("query-id,corpus-id,score\n1,007,1\n1,7,0\n")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace(".jsonl", ".csv"))
    data = load_retrieval(LocalData(folder))
    assert data.corpus.to_pydict() == {"id": ["007", "7"], "title": ["", ""], "text": ["NA", "1"]}
    assert (data.queries, data.relevant) == ({"1": "true"}, {"1": {"007": 1, "7": 0}})


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "r")
    path = folder / "corpus" / "corpus.jsonl"
    path.write_text(path.read_text().replace("d-apple", "d-bread"))
    with pytest.raises(EvaluationError, match="config 'corpus': an id occurs twice"):
        load_retrieval(LocalData(folder))


def test_queries_without_judgement_are_left_out(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "r")
    path = folder / "default" / "test.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:2]))
    data = load_retrieval(LocalData(folder))
    assert list(data.queries) == ["q-apple", "q-bread"]
    assert data.relevant == {"q-apple": {"d-apple": 1}, "q-bread": {"d-bread": 1}}
