"""Any text in any format comes back as it was, however it is cut into files, packed and encoded."""

import csv
import gzip
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.readers import open_texts, read_batches, read_table
from tests.core.readers.awkward import zstd

# What a text may hold in every format: NUL is no text in CSV, and surrogates are halves of characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
TEXTS = st.lists(TEXT, min_size=1, max_size=12)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=30)
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32": b""}


def in_csv(texts: list[str], delimiter: str) -> str:
    sink = io.StringIO(newline="")
    # A blank line is no row: an empty text of the only column stands in quotes.
    csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    return sink.getvalue()


WRITERS = {
    ".jsonl": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts),
    ".ndjson": lambda texts: "".join(json.dumps({"n": [], "text": text}, ensure_ascii=False) + "\r" for text in texts),
    ".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False),
    ".csv": lambda texts: in_csv(texts, ","),
    ".tsv": lambda texts: in_csv(texts, "\t"),
}


@given(TEXTS, st.sampled_from(list(WRITERS)), st.sampled_from(list(PACKED)), st.sampled_from(list(ENCODINGS)))
@example(["[{'role'", '[{"role": 1'], ".json", "", "utf-8")
@example(["", '"', ",", "\r", "\n\r\n"], ".csv", "", "utf-16-le")
@settings(max_examples=200)
def test_texts_come_back(texts: list[str], ending: str, packed: str, encoding: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}{packed}"
        path.write_bytes(PACKED[packed](ENCODINGS[encoding] + WRITERS[ending](texts).encode(encoding)))
        assert list(open_texts(path)) == texts
        assert read_table(path)["text"].to_pylist() == texts
        assert [text for batch in read_batches(path, 5) for text in batch["text"]] == texts


@given(st.lists(LINE, min_size=1, max_size=12), st.sampled_from(["\n", "\r", "\r\n"]), st.booleans())
def test_lines_come_back(texts: list[str], end: str, closed: bool) -> None:
    closed = closed or not texts[-1]  # an empty last line needs its end
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes((end.join(texts) + end * closed).encode("utf-8-sig"))
        assert list(open_texts(path)) == texts


@given(TEXTS, st.integers(1, 12), st.integers(1, 5))
def test_shards_are_one_after_another(texts: list[str], cut: int, rows: int) -> None:
    with TemporaryDirectory() as folder:
        parts = [part for part in (texts[:cut], texts[cut:]) if part]
        for number, part in enumerate(parts):
            pq.write_table(pa.table({"text": part}), Path(folder) / f"{number}.parquet", row_group_size=rows)
        file = open_texts(Path(folder))
        assert list(file) == texts
        assert [len(chunk) for chunk in file.chunks(rows)] == [
            min(rows, len(texts) - start) for start in range(0, len(texts), rows)
        ]


@given(
    st.binary(max_size=200),
    st.sampled_from(["a.txt", "a.csv", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.csv.zst"]),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_texts_or_one_error(content: bytes, name: str) -> None:
    from pipeline.core.errors import SourceError

    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in (open_texts, read_table):
            try:
                read(path)
            except SourceError as error:
                assert "\n" not in str(error)
