"""Awkward files as people have them, each with the texts that it holds, worked out by hand, or why it is refused.

`collect`, `encode`, `search`, `decode` and local tasks read every one alike: test_awkward_files.py.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Awkward:
    """Files by name, what of them is read, and the texts (None of a null) or the refusal (a pattern)."""

    name: str
    files: dict[str, bytes]
    texts: Sequence[str | None] = ()
    refusal: str = ""
    path: str = ""

    def write(self, folder: Path) -> Path:
        """Write the files; returns what to read."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder / (self.path or next(iter(self.files)))


def parquet(table: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    sink = BytesIO()
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, sink, **options)
    return sink.getvalue()


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    """One frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def user(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


# --- chats ----------------------------------------------------------------------------------------------------------

TWO_STYLES = pa.array(
    [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"}],
        [{"from": "human", "value": "two"}, {"from": "gpt", "value": "2"}],
        [{"role": "assistant", "content": "hello"}, {"from": "human", "value": "three"}],
    ],
    pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value")])),
)
PARTS: list[tuple[Any, str]] = [
    ([{"type": "text", "text": "one"}, {"type": "image", "url": "x"}, {"type": "text", "text": "part"}], "one\npart"),
    ([{"type": "text", "text": {"value": "two", "annotations": []}}], "two"),
    (["three", "strings"], "three\nstrings"),
    ({"content_type": "text", "parts": ["four"]}, "four"),
    ({"type": "text", "text": "five"}, "five"),
    ([{"type": "input_text", "text": "six"}, {"type": "image_url", "image_url": {"url": "x"}}], "six"),
    ([{"type": "text", "value": "seven", "text": None}], "seven"),
    ([{"type": "image", "url": "x"}], ""),
    (None, ""),
]
JSON_TEXTS = [
    json.dumps(user("in a string")),
    "no JSON",
    '"quoted"',
    '[{"a": 1}]',
    "[1, 2]",
    '{"role": "user"}',
    "[{'role'",
    "[{'role': {[1]: 2}, 'content': 'a list as a key'}]",
]
WRITTEN = "[{'role': 'user', 'content': 'as Python writes it'}, {'role': 'assistant', 'content': None}]"

# One message each, whose content is of Arrow's JSON type.
JSON_CONTENTS = pa.ListArray.from_arrays(
    [0, 1, 2],
    pa.StructArray.from_arrays(
        [pa.array(["user", "user"]), pa.array(['"one"', '[{"text": "two"}]'], pa.json_())], ["role", "content"]
    ),
)

CHATS = [
    Awkward("chats of two styles", {"a.parquet": parquet({"text": TWO_STYLES})}, ["one", "two", "three"]),
    Awkward(
        "chats of two styles in JSON",
        {"a.jsonl": jsonl({"text": [{"role": None, "content": None, "from": "human", "value": "x"}]})},
        ["x"],
    ),
    Awkward(
        "Arrow's JSON type: texts",
        {"a.parquet": parquet({"text": pa.array(['"say \\"hi\\""', '"[1, 2]"', None, '"x"'], pa.json_())})},
        ['say "hi"', "[1, 2]", None, "x"],
    ),
    Awkward(
        "Arrow's JSON type: chats",
        {"a.parquet": parquet({"text": pa.array([json.dumps(user("one")), json.dumps(user(["two"]))], pa.json_())})},
        ["one", "two"],
    ),
    Awkward(
        "Arrow's JSON type: messages and contents",
        {"a.parquet": parquet({"text": JSON_CONTENTS})},
        ["one", "two"],
    ),
    Awkward(
        "messages as a JSON string",
        {"a.jsonl": jsonl(*({"text": text} for text in JSON_TEXTS))},
        ["in a string", *JSON_TEXTS[1:]],
    ),
    Awkward("messages as Python writes them", {"a.jsonl": jsonl({"text": WRITTEN})}, ["as Python writes it"]),
    Awkward(
        "contents of many shapes",
        {"a.jsonl": jsonl(*({"text": user(content)} for content, _ in PARTS))},
        [text for _, text in PARTS],
    ),
    Awkward(
        "roles in capitals",
        {"a.jsonl": jsonl({"text": user("one", "User")}, {"text": [{"from": "HUMAN", "value": "two"}]})},
        ["one", "two"],
    ),
    Awkward("a message that is none", {"a.jsonl": jsonl({"text": "a"}, {"text": ["b"]})}, refusal="line 2: a message"),
    Awkward("content that is none", {"a.jsonl": jsonl({"text": user(7)})}, refusal="line 1: the content of a message"),
]

# --- JSON -----------------------------------------------------------------------------------------------------------

HUGE = 2**70
ARRAY: list[dict[str, Any]] = [{"text": "one"}, {"text": 'a "quoted" ], text'}, {"text": "three", "n": [{"x": [1]}]}]
MANY = [f"text {row}, and enough of it to fill several pieces" for row in range(5000)]

JSON = [
    Awkward(
        "a byte order mark", {"a.jsonl": b"\xef\xbb\xbf" + jsonl({"text": "one"}, {"text": "two"})}, ["one", "two"]
    ),
    Awkward(
        "NaN and infinities in another column",
        {"a.jsonl": b'{"text": "one", "x": NaN}\n{"text": "two", "x": -Infinity}\n'},
        ["one", "two"],
    ),
    Awkward("a key twice", {"a.jsonl": b'{"text": "first", "text": "last"}\n'}, ["last"]),
    Awkward(
        "another column whose type changes late",
        {"a.jsonl": jsonl(*({"text": text, "x": 1} for text in MANY), {"text": "late", "x": {"y": "z"}})},
        [*MANY, "late"],
    ),
    Awkward(
        "a text that is none, late",
        {"a.jsonl": jsonl(*({"text": text} for text in MANY), {"text": 5})},
        refusal="line 5001: found int '5'",
    ),
    Awkward(
        "integers of more than 64 bits",
        {"a.jsonl": jsonl({"text": "one", "n": HUGE}, {"text": "two", "n": -HUGE}, {"text": "three", "n": 1.5})},
        ["one", "two", "three"],
    ),
    Awkward(
        "an integer of 5,000 digits", {"a.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}"}, refusal="line 1: not"
    ),
    Awkward("nesting without end", {"a.jsonl": b'{"text": ' + b"[" * 10**5 + b"\n"}, refusal="line 1: not JSON"),
    Awkward("an array", {"a.json": json.dumps(ARRAY).encode()}, [row["text"] for row in ARRAY]),
    Awkward("an array over lines", {"a.json": json.dumps(ARRAY, indent=2).encode()}, [row["text"] for row in ARRAY]),
    Awkward("an array in a .jsonl", {"a.jsonl": b"\n" + json.dumps(ARRAY).encode()}, [row["text"] for row in ARRAY]),
    Awkward("a long array", {"a.json": json.dumps([{"text": text} for text in MANY]).encode()}, MANY),
    Awkward("an array that ends early", {"a.json": b'[{"text": "a"}, {"text": "b"'}, refusal="item 2: not JSON"),
    Awkward("an array without a comma", {"a.json": b'[{"text": "a"} {"text": "b"}]'}, refusal="item 1: not JSON"),
    Awkward("text behind an array", {"a.json": b'[{"text": "a"}]\n[{"text": "b"}]'}, refusal="text behind the list"),
    Awkward("an array with a number", {"a.json": b'[{"text": "a"}, 7]'}, refusal="item 2: a int, not an object"),
    Awkward(
        "nulls before texts",
        {"a.jsonl": jsonl(*[{"text": None}] * 150, {"text": "one"}, {"text": "two"})},
        [*[None] * 150, "one", "two"],
    ),
]

# --- CSV ------------------------------------------------------------------------------------------------------------

LOOKALIKES = ["1", "2.5", "007", "true", "False", "NA", "null", "nan", "None", "N/A", "-", "1e5", "2020-01-01"]

CSV = [
    Awkward(
        "a hundred numbers, then words",
        {"a.csv": ("text\n" + "".join(f"{row}\n" for row in range(150)) + "words\n").encode()},
        [*map(str, range(150)), "words"],
    ),
    Awkward(
        "texts that look like something else",
        {"a.csv": ("id,text\n" + "".join(f"{row},{text}\n" for row, text in enumerate(LOOKALIKES))).encode()},
        LOOKALIKES,
    ),
    Awkward("numbers alone", {"a.tsv": b"n\ttext\n1\t4\n2\t5\n"}, ["4", "5"]),
    Awkward("line ends in quotes", {"a.csv": b'text,n\r\n"two\nlines",1\r\n"a\r\nb",2\r\n'}, ["two\nlines", "a\r\nb"]),
    Awkward("an empty text", {"a.csv": b'n,text\n1,\n2,""\n3,x\n'}, ["", "", "x"]),
    Awkward("two columns of one name", {"a.csv": b"text,text\na,b\n"}, refusal="two columns"),
    Awkward("a comma too many", {"a.csv": b"n,text\n1,a\n2,b,c\n"}, refusal="line 3: 3 fields, but the header has 2"),
]

# --- columns of Parquet ---------------------------------------------------------------------------------------------

WORDS = ["one", "two", "one", None]
COLUMNS = [
    Awkward("a dictionary", {"a.parquet": parquet({"text": pa.array(WORDS).dictionary_encode()})}, WORDS),
    Awkward("a string view", {"a.parquet": parquet({"text": pa.array(WORDS, pa.string_view())})}, WORDS),
    Awkward("a large string", {"a.parquet": parquet({"text": pa.array(WORDS, pa.large_string())})}, WORDS),
    Awkward(
        "blocks of nulls first",
        {"a.parquet": parquet({"text": pa.array([None] * 200 + ["one", "two"])}, row_group_size=100)},
        [*[None] * 200, "one", "two"],
    ),
    Awkward("numbers", {"a.parquet": parquet({"text": pa.array([None, 5])})}, refusal="row 1: found int '5'"),
]

# --- bytes and lines ------------------------------------------------------------------------------------------------

LATIN = "text\nfine\ncaf\u00e9\n".encode("latin-1")  # the wrong byte is the 14th
LINES = ["a", "", "b c"]

BYTES = [
    Awkward("lone carriage returns", {"a.txt": b"a\r\rb c\r"}, LINES),
    Awkward("carriage returns and newlines", {"a.txt": b"a\r\n\r\nb c\r\n"}, LINES),
    Awkward("no newline at the end", {"a.txt": b"a\n\nb c"}, LINES),
    Awkward("other separators are no ends", {"a.txt": "a\u2028b\x0bc\u0085d\n".encode()}, ["a\u2028b\x0bc\u0085d"]),
    Awkward("carriage returns in CSV", {"a.csv": b"n,text\r1,a\r2,b\r"}, ["a", "b"]),
    Awkward("carriage returns in JSON Lines", {"a.jsonl": b'{"text": "a"}\r{"text": "b"}\r'}, ["a", "b"]),
    *(
        Awkward(f"{encoding} in {name}", {name: mark + text.encode(encoding)}, ["سؤال 👩‍🚀", "é"])
        for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("utf-8", b"\xef\xbb\xbf"))
        for name, text in (
            ("a.txt", "سؤال 👩‍🚀\né\n"),
            ("a.csv", "text,n\nسؤال 👩‍🚀,1\né,2\n"),
            ("a.jsonl", '{"text": "سؤال 👩‍🚀"}\n{"text": "é"}\n'),
        )
    ),
    Awkward("spaces at the ends", {"a.txt": b"  a \n\tb\t\n"}, ["  a ", "\tb\t"]),
    Awkward("characters in two parts", {"a.txt": "e\u0301\n".encode()}, ["e\u0301"]),
    Awkward("Latin-1 text", {"a.txt": LATIN}, refusal=r"line 3: not UTF-8 \(byte 0xe9 at offset 13\)"),
    Awkward("Latin-1 CSV", {"a.csv": LATIN}, refusal=r"line 3: not UTF-8 \(byte 0xe9 at offset 13\)"),
    Awkward(
        "Latin-1 behind a byte order mark, far down",
        {"a.txt": b"\xef\xbb\xbf" + b"0123456789\r\n" * 10_000 + b"ab\xe9"},
        refusal=r"line 10001: not UTF-8 \(byte 0xe9 at offset 120005\)",
    ),
    Awkward("a character cut off", {"a.txt": "ab\né".encode()[:-1]}, refusal=r"line 2: not UTF-8 .*offset 3\)"),
    Awkward("half a surrogate pair in UTF-16", {"a.txt": b"\xff\xfea\0\n\0\0\xd8b\0"}, refusal="line 2: not UTF-16"),
    Awkward("UTF-16 without a mark", {"a.txt": "ab\n".encode("utf-16-le")}, refusal="line 1: holds a NUL"),
]

# --- files and folders ----------------------------------------------------------------------------------------------

ONE_TWO = jsonl({"text": "one"}, {"text": "two"})
THREE = jsonl({"text": "three"})

FILES = [
    Awkward("gzip", {"a.jsonl.gz": gzip.compress(ONE_TWO)}, ["one", "two"]),
    Awkward(
        "gzip in two members", {"a.jsonl.gz": gzip.compress(ONE_TWO) + gzip.compress(THREE)}, ["one", "two", "three"]
    ),
    Awkward("zstd", {"a.jsonl.zst": zstd(ONE_TWO)}, ["one", "two"]),
    Awkward("zstd in two frames", {"a.jsonl.zst": zstd(ONE_TWO) + zstd(THREE)}, ["one", "two", "three"]),
    Awkward("packed CSV", {"a.csv.gz": gzip.compress(b"text\nNA\n1\n")}, ["NA", "1"]),
    Awkward("packed text", {"a.txt.zst": zstd(b"a\nb\n")}, ["a", "b"]),
    Awkward("a packed array", {"a.json.gz": gzip.compress(json.dumps(ARRAY).encode())}, [row["text"] for row in ARRAY]),
    Awkward("packed UTF-16", {"a.txt.gz": gzip.compress(b"\xff\xfe" + "é\n".encode("utf-16-le"))}, ["é"]),
    Awkward("endings in capitals", {"A.JSONL": ONE_TWO}, ["one", "two"]),
    Awkward("packed, in capitals", {"A.Csv.GZ": gzip.compress(b"text\na\n")}, ["a"]),
    Awkward("Parquet in capitals", {"A.PARQUET": parquet({"text": ["a"]})}, ["a"]),
    Awkward(
        "a folder of shards",
        {
            "d/part-1.jsonl": THREE,
            "d/part-0.jsonl.gz": gzip.compress(ONE_TWO),
            "d/README.md": b"# no text",
            "d/.part-2.jsonl": b"hidden",
            "d/_SUCCESS": b"",
        },
        ["one", "two", "three"],
        path="d",
    ),
    Awkward(
        "a pattern",
        {"b-1.jsonl": THREE, "b-0.jsonl": ONE_TWO, "c-0.jsonl": b"not JSON"},
        ["one", "two", "three"],
        path="b-*.jsonl",
    ),
    Awkward(
        "a folder of two kinds", {"d/a.jsonl": ONE_TWO, "d/b.csv": b"text\n"}, path="d", refusal=r"\.csv and \.jsonl"
    ),
    Awkward("a folder without texts", {"d/a.md": b"x"}, path="d", refusal="holds no file of a known format"),
    Awkward("a pattern of nothing", {"a.jsonl": ONE_TWO}, path="b*.jsonl", refusal="no file matches"),
    Awkward("gzip cut off", {"a.txt.gz": gzip.compress(b"abc\n" * 10_000)[:-20]}, refusal="is damaged or no gzip file"),
    Awkward("zstd cut off", {"a.txt.zst": zstd(b"abc\n" * 10_000)[:-9]}, refusal="is damaged or no zstd file"),
    Awkward("no gzip", {"a.txt.gz": b"plain\n"}, refusal="is damaged or no gzip file"),
    Awkward("packed Parquet", {"a.parquet.gz": b""}, refusal=r"unknown format '\.parquet\.gz'"),
]

CASES = [*CHATS, *JSON, *CSV, *COLUMNS, *BYTES, *FILES]
