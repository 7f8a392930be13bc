"""Files and hub data sets as texts and tables: every format, chats, one clear message for each broken input."""

import gc
import json
import re
import shutil
import tracemalloc
import warnings
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.config import Params, validate
from pipeline.core.errors import ParamsError, SourceError
from pipeline.core.readers import (
    HubSource,
    LocalSource,
    Source,
    check_not_read,
    find_files,
    open_texts,
    read_batches,
    read_table,
    read_texts,
    spooled,
)
from pipeline.core.readers.rows import READ_ROWS


def local(folder: Path, name: str, column: str | None = "text", limit: int | None = None) -> list[str]:
    return list(read_texts(LocalSource(kind="local", path=name, column=column, limit=limit), folder))


def refusal(folder: Path, name: str, column: str | None = "text") -> str:
    with pytest.raises(SourceError) as caught:
        local(folder, name, column)
    return str(caught.value)


TRICKY = ["plain", 'a "quoted", comma', "two\nlines", "سؤال", "👩‍🚀", "", "x" * 200_000]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    import csv

    pq.write_table(pa.table({"n": range(len(TRICKY)), "text": TRICKY}), tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.json", "q.ndjson"):
        rows = (json.dumps({"n": 1, "text": text}, ensure_ascii=name == "q.json") for text in TRICKY)
        (tmp_path / name).write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    for name, delimiter in (("q.csv", ","), ("q.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("n", "text"), *((1, text) for text in TRICKY)])
    return tmp_path


@pytest.mark.parametrize("name", ["q.parquet", "q.jsonl", "q.json", "q.ndjson", "q.csv", "q.tsv"])
def test_every_format_gives_the_same_texts(files: Path, name: str) -> None:
    assert local(files, name) == TRICKY
    assert local(files, name, limit=2) == TRICKY[:2]


def test_a_text_file_has_one_query_a_line(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes("\ufefffirst\r\n\nthird سؤال\n".encode())
    assert [text.strip() for text in local(tmp_path, "q.txt", None)] == ["first", "", "third سؤال"]
    assert refusal(tmp_path, "q.txt").startswith(f"column: {tmp_path}/q.txt: a .txt file has no columns")


def test_absolute_paths_do_not_need_the_folder(files: Path) -> None:
    assert local(Path("/nowhere"), str(files / "q.csv"), limit=1) == ["plain"]


CHATS: list[tuple[Any, str]] = [
    (
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "one"},
            {"role": "user", "content": "2"},
        ],
        "one",
    ),
    ([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "two"}], "two"),
    ([{"role": "system", "content": "nobody asks"}], ""),
    ([], ""),
    (None, ""),
    ([{"role": "user", "content": None}], ""),
]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(("role", "content", "user"), [("role", "content", "user"), ("from", "value", "human")])
def test_the_first_user_turn_of_a_chat_is_the_query(
    tmp_path: Path, suffix: str, role: str, content: str, user: str
) -> None:
    names = {"role": role, "content": content}
    values = {"user": user}
    chats = [
        chat and [{names[key]: values.get(value, value) for key, value in turn.items()} for turn in chat]
        for chat, _ in CHATS
    ]
    path = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), path)
    else:
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    assert local(tmp_path, path.name, "messages") == [text for _, text in CHATS]


def test_the_text_parts_of_a_multimodal_message_are_the_query(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "what is"}, {"type": "image", "url": "x"}, {"type": "text", "text": "this?"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"m": [{"role": "user", "content": content}]}))
    assert local(tmp_path, "q.jsonl", "m") == ["what is\nthis?"]


def test_lone_surrogates_and_nul_in_json_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "a\\ud800b\\u0000"}\n{"text": "\\ud83d\\ude00"}\n')
    assert local(tmp_path, "q.jsonl") == ["a\ud800b\x00", "😀"]


# --- broken input ---------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, "gone.jsonl") == f"path: {tmp_path}/gone.jsonl does not exist"


@pytest.mark.parametrize("name", ["q.xlsx", "q", "q.parquet.bak"])
def test_an_unknown_format(tmp_path: Path, name: str) -> None:
    known = ".parquet, .jsonl, .ndjson, .json, .csv, .tsv, .txt; text also packed: .gz, .zst, .bz2"
    assert refusal(tmp_path, name) == f"path: {tmp_path}/{name}: unknown format '{Path(name).suffix}' (known: {known})"


@pytest.mark.parametrize("name", ["q.parquet", "q.csv", "q.tsv"])
def test_a_missing_column_lists_those_there(files: Path, name: str) -> None:
    assert refusal(files, name, "question") == f"column: {files}/{name}: no column 'question' (columns there: n, text)"
    assert local(files, name, None) == TRICKY


def test_a_missing_column_in_json_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "a"}\n{"txt": "b", "id": 1}\n')
    assert (
        refusal(tmp_path, "q.jsonl") == f"column: {tmp_path}/q.jsonl, line 2: no column 'text' (columns there: txt, id)"
    )


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_parquet_file(files: Path, keep: int) -> None:
    path = files / "q.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(files, "q.parquet").startswith(f"{path} is damaged or no parquet file: ")


def test_a_parquet_file_damaged_inside(files: Path) -> None:
    path = files / "q.parquet"
    content = bytearray(path.read_bytes())
    start = content.index(b"plain")
    content[start - 30 : start + 60] = b"\xff" * 90
    path.write_bytes(content)
    assert refusal(files, "q.parquet").startswith(f"{path} is damaged or no parquet file: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "b"', "not JSON"),
        ("plain words", "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('"text"', "a str, not an object"),
    ],
)
def test_a_broken_json_line_has_its_number(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    assert refusal(tmp_path, "q.jsonl").startswith(f"{tmp_path}/q.jsonl, line 3: {reason}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,what, really", "line 3: 3 fields, but the header has 2 (a comma outside quotes?)"),
        ("1", "line 3: 1 fields, but the header has 2 (a comma outside quotes?)"),
        ('1,"never closed', "line 4: broken row (unexpected end of data)"),
        ('1,"closed" too early', "line 3: broken row ("),
    ],
)
def test_a_broken_csv_row_has_its_line(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "q.csv").write_text(f"id,text\n0,fine\n{row}\n2,fine\n")
    assert refusal(tmp_path, "q.csv").startswith(f"{tmp_path}/q.csv, {reason}")


@pytest.mark.parametrize(
    "value", [3, 1.5, True, {"role": "user"}, ["text"], [{"text": "x"}], [{"role": "user", "content": 3}]]
)
def test_values_that_are_neither_texts_nor_chats(tmp_path: Path, value: object) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": value}))
    message = refusal(tmp_path, "q.jsonl")
    assert message.startswith(f"column: {tmp_path}/q.jsonl, line 1: ")
    assert "list of messages" in message or "a message must have" in message or "content of a message" in message


def test_a_value_that_is_no_text_is_named_by_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None, None, 5])}), tmp_path / "q.parquet")
    assert refusal(tmp_path, "q.parquet").startswith(f"column: {tmp_path}/q.parquet, row 2: found int '5'")


@pytest.mark.parametrize("name", ["q.csv", "q.jsonl", "q.txt", "q.parquet"])
def test_an_empty_file_yields_nothing_or_says_what_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    if name in ("q.jsonl", "q.txt"):
        assert local(tmp_path, name, None if name == "q.txt" else "text") == []
    else:
        assert refusal(tmp_path, name)


def test_nulls_are_counted_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"text": [None] * 3 + ["a"]}), tmp_path / "q.parquet")
    assert local(tmp_path, "q.parquet") == ["", "", "", "a"]
    assert "q.parquet: column 'text' is null in 3 of 4 rows" in caplog.text


def test_an_input_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q.txt").write_text("a\n")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "q.parquet")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pa, "input_stream", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    for name in ("q.txt", "q.parquet"):
        with pytest.raises(SourceError, match=f"path: .*{name} cannot be read: permission denied"):
            open_texts(tmp_path / name)


# --- files of texts to embed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.parquet", "q.jsonl", "q.json", "q.ndjson", "q.csv", "q.tsv"])
def test_a_text_file_of_every_format(files: Path, name: str) -> None:
    file = open_texts(files / name)
    assert file.rows == len(TRICKY)
    assert list(file) == TRICKY


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_many_rows_keep_their_order(tmp_path: Path, suffix: str) -> None:
    count, path = 3 * READ_ROWS + 5, tmp_path / f"t.{suffix}"
    frame = pl.DataFrame({"text": [f"row {row}" for row in range(count)], "other": ["x"] * count})
    getattr(frame, {"jsonl": "write_ndjson"}.get(suffix, f"write_{suffix}"))(path)
    file = open_texts(path)
    assert file.rows == count
    assert list(file) == [f"row {row}" for row in range(count)]
    assert [len(chunk) for chunk in file.chunks(5000)] == [5000, 5000, count - 10000]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"a\rb\r", ["a", "b"]),
        (b"\xef\xbb\xbfa  b \n", ["a  b "]),
    ],
)
def test_texts_stay_as_they_stand_or_are_normalised(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    assert list(open_texts(tmp_path / "t.txt")) == texts
    assert list(open_texts(tmp_path / "t.txt", tidy=True)) == [text.strip().replace("  ", " ") for text in texts]


def test_half_a_surrogate_pair_is_refused_or_tidied(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(
        SourceError, match=r"tidy: .*t\.jsonl, line 2 holds '.ud800' at character 1, half of a surrogate"
    ):
        open_texts(tmp_path / "t.jsonl")
    assert list(open_texts(tmp_path / "t.jsonl", tidy=True)) == ["fine", "ab"]
    with pytest.raises(SourceError, match=r"t\.jsonl, line 2: '.ud800' is half of a character"):
        read_table(tmp_path / "t.jsonl")


def test_chats_are_embedded_by_their_first_user_turn(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat, _ in CHATS if chat))
    assert list(open_texts(tmp_path / "t.jsonl")) == [text for chat, text in CHATS if chat]


def test_nulls_and_files_without_a_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n\n{"text": null}\n{"text": null}\n')
    with pytest.raises(SourceError, match=r"column: .*column 'text' is null in 2 rows, first in line 3"):
        open_texts(tmp_path / "t.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SourceError, match=r"path: .*empty\.jsonl holds no text"):
        open_texts(tmp_path / "empty.jsonl")


def test_an_output_that_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.npy").touch()
    (tmp_path / "link.npy").symlink_to(tmp_path / "in.npy")
    check_not_read(tmp_path / "new.npy", tmp_path / "in.npy")
    with pytest.raises(SourceError, match=r"output: .*link\.npy is read itself"):
        check_not_read(tmp_path / "link.npy", tmp_path / "in.npy")
    check_not_read(tmp_path.parent / "out.parquet", tmp_path)
    check_not_read(tmp_path / "out.parquet", tmp_path / "*.jsonl")
    for read in (tmp_path, tmp_path / "*.parquet", tmp_path / "o*"):
        with pytest.raises(SourceError, match=r"output: .*out\.parquet would be read together with"):
            check_not_read(tmp_path / "out.parquet", read)


def test_no_shard_of_a_folder_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind links, in circles, below a folder that may not be read, or gone."""
    for name in ("in/b/1.txt", "in/a.txt", "elsewhere/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert list(open_texts(tmp_path / "in")) == ["in/a.txt", "in/b/1.txt", "elsewhere/2.txt"]
    (tmp_path / "in" / "d.txt").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "in", tmp_path / "in" / "*.txt"):
        with pytest.raises(SourceError, match=r"path: .*d\.txt is a link to nothing"):
            find_files(path)
    iterdir = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied")
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SourceError, match=r"path: .*in cannot be read: Permission denied"):
        find_files(tmp_path / "in")


def test_standard_input_is_a_file_for_a_while(tmp_path: Path) -> None:
    with spooled(BytesIO(b'{"text": "a"}\n'), "jsonl", tmp_path) as (file, digest):
        texts = open_texts(file, identity=digest)
        assert (list(texts), texts.identity) == (["a"], sha256(b'{"text": "a"}\n').hexdigest())
        with pytest.raises(SourceError, match="column: standard input, line 1: no column 'x'"):
            open_texts(file, "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SourceError, match="format: .*unknown format '.pdf'"), spooled(BytesIO(), "pdf", tmp_path):
        pass


def test_memory_does_not_grow_with_an_array(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        with (tmp_path / "a.json").open("w") as file:
            file.write("[" + ",\n".join(json.dumps({"text": f"{row:09d} {'x' * 200}"}) for row in range(rows)) + "]")
        tracemalloc.start()
        assert sum(1 for _ in open_texts(tmp_path / "a.json")) == rows
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small = peak(1000)
    assert peak(10_000) < small + 2**20


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.parquet", "q.jsonl", "q.json", "q.ndjson", "q.csv", "q.tsv"])
def test_a_table_of_every_format(files: Path, name: str) -> None:
    table = read_table(files / name)
    texts_only = name in ("q.csv", "q.tsv")
    assert table["n"].type == (pa.string() if texts_only else pa.int64())
    assert [text or "" for text in table["text"].to_pylist()] == TRICKY
    batches = list(read_batches(files / name, 2, without=["n"]))
    assert [text or "" for batch in batches for text in batch["text"]] == TRICKY
    assert all(set(batch) == {"text"} for batch in batches)


def test_a_text_file_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo")
    assert read_table(tmp_path / "t.txt").to_pydict() == {"text": ["one", "", "two"]}


@pytest.mark.parametrize(
    ("first", "last", "values", "type_"),
    [
        (1, 2.5, [1.0, 2.5], pa.float64()),
        (1, "a", ["1", "a"], pa.string()),
        (None, "a", [None, "a"], pa.string()),
        (True, 1, ["true", "1"], pa.string()),
        (2**70, 1, [str(2**70), "1"], pa.string()),
        (2**60 + 1, 0.5, [str(2**60 + 1), "0.5"], pa.string()),
        ({"a": 1}, {"b": "x"}, [{"a": 1, "b": None}, {"a": None, "b": "x"}], None),
        ({"a": 1}, "x", ['{"a": 1}', "x"], pa.string()),
        ({}, {}, ["{}", "{}"], pa.string()),
        (["x"], [1], ['["x"]', "[1]"], pa.string()),
    ],
)
@pytest.mark.parametrize("far", [0, READ_ROWS])
def test_a_column_has_the_type_of_all_its_rows(
    tmp_path: Path, first: object, last: object, values: list[object], type_: pa.DataType | None, far: int
) -> None:
    """However far apart the rows are; no number changes."""
    rows = [first, *[None] * far, last]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"x": row}) + "\n" for row in rows))
    column = read_table(tmp_path / "t.jsonl")["x"]
    assert type_ in (None, column.type)
    assert [column[0].as_py(), column[-1].as_py()] == values
    assert column.null_count == far + (first is None)


def test_files_as_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.csv").write_text("x,y\n007,NA\n")
    table = read_table(tmp_path / "a.jsonl", tmp_path / "b.csv")
    assert table.to_pydict() == {"x": ["1", "007"], "y": [None, "NA"]}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", "a,b\n1,2\n3,4,5\n", "line 3: 3 fields"),
        ("t.jsonl", '{"a": 1}\n{"a"\n', "line 2: not JSON"),
        ("t.parquet", "PAR1", "is damaged or no parquet file"),
        ("t.xml", "", "unknown format '.xml'"),
    ],
)
def test_a_broken_table_names_the_file_and_the_line(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    for read in (read_table, lambda path: list(read_batches(path, 2))):
        with pytest.raises(SourceError, match=rf"{re.escape(name)}.*{re.escape(problem)}"):
            read(tmp_path / name)


# --- hub data sets --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data set in the hub's layout; the library reads a folder as it reads a repository."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "prompts"
    folder.mkdir()
    chats = [{"messages": [{"role": "user", "content": f"q{n}"}], "text": f"t{n}"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(chats), folder / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(chats[:1]), folder / "test-00000.parquet")
    yield folder
    datasets.enable_progress_bars()


def hub(folder: Path, **keys: Any) -> list[str]:
    return list(read_texts(HubSource(kind="hub", name=str(folder), **keys), Path("unused")))


def test_a_hub_data_set_by_split_and_column(hub_folder: Path) -> None:
    assert hub(hub_folder, column="text") == [f"t{n}" for n in range(5)]
    assert hub(hub_folder, column="messages", split="test") == ["q0"]


@pytest.mark.parametrize("limit", [None, 3])
def test_a_hub_data_set_is_streamed(hub_folder: Path, limit: int | None) -> None:
    assert hub(hub_folder, column="messages", limit=limit) == ["q0", "q1", "q2", "q3", "q4"][:limit]
    assert not list(hub_folder.parent.rglob("*.arrow"))


def test_texts_of_a_hub_data_set_in_csv_are_texts(hub_folder: Path) -> None:
    texts = ["NA", "null", "nan", "1", "007", "true", "", "2.50", "a, b"]
    for path in hub_folder.iterdir():
        path.unlink()
    lines = "".join(f'{n},"{text}"\n' for n, text in enumerate(texts))
    (hub_folder / "train.csv").write_text(f"n,text\n{lines}")
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # the library leaves the file to gc
        assert hub(hub_folder, column="text") == texts == local(hub_folder, "train.csv")
        with pytest.raises(SourceError, match=r"cannot read data set .*not found: \['x'\]"):
            hub(hub_folder, column="x")
        gc.collect()


def test_a_file_that_datasets_wrote_reads_as_its_data_set(hub_folder: Path) -> None:
    import datasets

    messages = [
        [{"role": "user", "content": "plain"}],
        [{"role": "user", "content": [{"type": "text", "text": "in a part"}]}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": 'a "quoted" text'}],
    ]
    rows = [{"messages": chat, "text": f"t{n}"} for n, chat in enumerate(messages)]
    for path in hub_folder.iterdir():
        path.unlink()
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made.to_parquet(hub_folder / "train.parquet")
    assert "Json" in str(made.features)
    expected = ["plain", "in a part", 'a "quoted" text']
    assert hub(hub_folder, column="messages") == expected
    assert local(hub_folder, "train.parquet", "messages") == expected


@pytest.mark.parametrize("limit", [None, 2])
def test_a_missing_column_of_a_hub_data_set(hub_folder: Path, limit: int | None) -> None:
    what = re.escape(
        f"data set {hub_folder} (split train, revision main): no column 'x' (columns there: messages, text)"
    )
    with pytest.raises(SourceError, match=what):
        hub(hub_folder, column="x", limit=limit)


def test_a_missing_split_of_a_hub_data_set(hub_folder: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read data set .* \(split dev, revision main\).*dev"):
        hub(hub_folder, column="text", split="dev")


@pytest.mark.parametrize("limit", [None, 2])
def test_offline_the_message_says_what_is_needed(limit: int | None) -> None:
    source = HubSource(kind="hub", name="some/prompts", config="all", column="text", revision="abc123", limit=limit)
    what = re.escape("data set some/prompts/all (split train, revision abc123): ")
    need = re.escape("(a hub that answers or a filled datasets cache is needed)")
    with pytest.raises(SourceError, match=f"cannot read {what}.*{need}"):
        list(read_texts(source, Path("unused")))


def test_a_cache_of_another_revision_does_not_stand_in_for_a_pinned_one(hub_folder: Path) -> None:
    import datasets

    commits = ["a" * 40, "b" * 40]
    builder = datasets.load_dataset_builder(str(hub_folder))
    builder.download_and_prepare()
    cached = hub_folder.parent / "cache" / "some___prompts" / "default" / "0.0.0" / commits[0]
    shutil.copytree(builder.cache_dir, cached)

    def read(revision: str | None, limit: int | None) -> list[str]:
        source = HubSource(kind="hub", name="some/prompts", column="text", revision=revision, limit=limit)
        return list(read_texts(source, Path("unused")))

    for limit in (None, 3):
        assert read(commits[0], limit) == read(None, limit) == [f"t{n}" for n in range(5)][:limit]
        with pytest.raises(SourceError, match=f"holds revision {commits[0]}, not {commits[1]}: fill the cache"):
            read(commits[1], limit)


# --- params ---------------------------------------------------------------------------------------------------------


class Sources(Params):
    sources: list[Source]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"kind": "ftp"}, "sources.0: .*'ftp'"),
        ({"path": "x"}, "sources.0: .*'kind'"),
        ({"kind": "local"}, "sources.0.local.path: missing"),
        ({"kind": "hub", "name": "a/b"}, "sources.0.hub.column: missing"),
        ({"kind": "local", "path": "x", "split": "train"}, "sources.0.local.split: unknown key"),
        ({"kind": "local", "path": "x", "limit": 0}, "sources.0.local.limit: .*greater than or equal to 1"),
    ],
)
def test_mistakes_in_a_source_are_named(entry: dict[str, object], problem: str) -> None:
    with pytest.raises(ParamsError, match=problem):
        validate({"sources": [entry]}, Sources, where="params.yaml")
