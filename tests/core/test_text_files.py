"""Texts of a user's file, as a stream."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline.core.errors import SourceError
from pipeline.core.text_files import READ_ROWS, open_texts

TEXTS = ["one", 'zwei, "drei"', "", "東京\nnext line", " spaces   inside "]
NORMAL = ["one", 'zwei, "drei"', "", "東京\nnext line", "spaces inside"]
WRITERS: dict[str, Callable[[pl.DataFrame, str], object]] = {
    "t.jsonl": lambda frame, name: frame.write_ndjson(name),
    "t.csv": lambda frame, name: frame.write_csv(name),
    "t.parquet": lambda frame, name: frame.write_parquet(name),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_column(workspace: Path, name: str) -> None:
    WRITERS[name](pl.DataFrame({"n": range(5), "text": TEXTS}), name)
    file = open_texts(Path(name))
    assert file.rows == 5
    assert list(file) == NORMAL


@pytest.mark.parametrize("name", WRITERS)
def test_many_rows_keep_their_order(workspace: Path, name: str) -> None:
    count = 3 * READ_ROWS + 5
    WRITERS[name](pl.DataFrame({"text": [f"row {row}" for row in range(count)], "other": ["x"] * count}), name)
    file = open_texts(Path(name))
    assert file.rows == count
    assert list(file) == [f"row {row}" for row in range(count)]
    assert [len(chunk) for chunk in file.chunks(5000)] == [5000, 5000, count - 10000]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"caf\xe9\n", ["caf\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_lines(workspace: Path, content: bytes, texts: list[str]) -> None:
    Path("t.txt").write_bytes(content)
    assert list(open_texts(Path("t.txt"))) == texts
    assert open_texts(Path("t.txt")).rows == len(texts)


def test_mistakes_name_the_option_the_file_and_the_way_out(workspace: Path) -> None:
    Path("t.csv").write_text("a,text\n1,x\n")
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(SourceError, match=r"column: t\.csv has no column 'q' \(columns there: a, text\)"):
        open_texts(Path("t.csv"), "q")
    with pytest.raises(SourceError, match=r"unknown format '\.pdf'"):
        Path("t.pdf").write_text("x")
        open_texts(Path("t.pdf"))
    with pytest.raises(SourceError, match=r"bad\.jsonl is damaged or no jsonl file"):
        open_texts(Path("bad.jsonl"))
    with pytest.raises(SourceError, match=r"empty\.jsonl"):
        open_texts(Path("empty.jsonl"))
