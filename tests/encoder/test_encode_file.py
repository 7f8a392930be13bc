"""A file embedded in chunks: what is on the disk after a kill, and what the finished file holds."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import SourceError, WorkError
from pipeline.core.readers import open_texts
from pipeline.core.row_store import lock_folder
from pipeline.core.run import work_dir
from pipeline.encoder.embedded_by import EMBEDDED_BY, not_made_by
from pipeline.encoder.encode_file import encode_file, kept_columns
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.inference import Embedded
from pipeline.encoder.storage import Storage
from tests.conftest import ROOT
from tests.stage_runs import wait_until

WIDTH = 3


CONFIG = EncoderConfig(
    backbone={"name": "none"}, chat_template_kwargs={}, template="raw", max_query_tokens=9,
    compression_tokens=1, thought_tokens=0, hidden=WIDTH, width=WIDTH, teacher={},
)  # fmt: skip


class LengthEncoder:
    """An encoder whose embedding of a text is known: its length, its first character, and one."""

    width = WIDTH
    identity = {"name": "lengths", "sha256": "abc"}
    config = CONFIG
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"), dtype="float32")

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self._fail_at = fail_at

    def width_of(self, space: str) -> int:
        return WIDTH if space == "trained" else WIDTH - 1

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.embed(texts, **options).vectors

    def embed(
        self, texts: Sequence[str], *, instruction: str = "", batch_tokens: int | None = None, space: str = "trained"
    ) -> Embedded:
        """Texts of more than nine characters count as cut."""
        if len(self.calls) == self._fail_at:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        vectors = expected([instruction + text for text in texts])[:, : self.width_of(space)]
        return Embedded(vectors, sum(len(text) > 9 for text in texts))


def expected(texts: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), ord(text[0]), 1.0] for text in texts], dtype=np.float32)


def encode(output: str, encoder: Any = None, source: str = "in.txt", **options: Any) -> Any:
    return encode_file(encoder or LengthEncoder(), open_texts(Path(source)), Path(output), chunk_rows=4, **options)


def write(count: int = 10) -> list[str]:
    texts = [f"{row} is a text"[: 5 + row % 7] for row in range(count)]
    Path("in.txt").write_text("".join(text + "\n" for text in texts))
    return texts


def parts() -> list[Path]:
    return sorted(work_dir("encode").glob("*/*.npy"))


def test_npy_is_what_numpy_would_write(workspace: Path) -> None:
    texts = write()
    assert encode("out.npy") == (10, WIDTH, 0, 2)
    np.save("all.npy", expected(texts))
    assert Path("out.npy").read_bytes() == Path("all.npy").read_bytes()
    assert not parts()


def test_the_teachers_space_has_its_own_width_and_work(workspace: Path) -> None:
    texts = write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    assert encode("out.npy", space="teacher") == (10, WIDTH - 1, 0, 2)
    np.testing.assert_array_equal(np.load("out.npy"), expected(texts)[:, :-1])
    encode("out.parquet", space="teacher")
    said = json.loads(pq.read_schema("out.parquet").metadata[EMBEDDED_BY])
    assert (said["space"], said["transform"]) == ("teacher", None)


def test_parquet_holds_the_texts_too_and_says_who_made_it(workspace: Path) -> None:
    texts = write()
    encode("out.parquet", instruction="I")
    table = pl.read_parquet("out.parquet")
    assert table.columns == ["text", "embedding"]
    assert table["text"].to_list() == texts
    np.testing.assert_array_equal(table["embedding"].to_numpy(), expected([f"I{text}" for text in texts]))
    made_by = json.loads(pq.read_schema("out.parquet").metadata[EMBEDDED_BY])
    # Left out while they change nothing.
    usual = {"response_share", "response_form", "pool", "rotated_width", "decorrelate_reading"}
    config = CONFIG.model_dump(exclude={"teacher", "origin", "transform", *usual})
    assert made_by == {"encoder": {"sha256": "abc", "config": config}, "instruction": "I"}


# --- columns that are kept ------------------------------------------------------------------------------------------


def keeping(keep: str, source: str, column: str | None = None) -> pl.DataFrame:
    texts = open_texts(Path(source), column)
    encode_file(LengthEncoder(), texts, Path("out.parquet"), chunk_rows=4, kept=kept_columns(texts, keep))  # type: ignore[arg-type]
    return pl.read_parquet("out.parquet")


def rows_with_columns(count: int = 10) -> list[dict[str, Any]]:
    return [
        {"id": row, "text": f"text {row}", "url": f"http://{row}", "tags": ["a"] * (row % 3)} for row in range(count)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_are_kept_with_their_types(workspace: Path, suffix: str) -> None:
    rows = rows_with_columns()
    frame = pl.DataFrame(rows)
    getattr(frame, {"jsonl": "write_ndjson"}.get(suffix, "write_parquet"))(f"in.{suffix}")
    table = keeping("url, id", f"in.{suffix}")
    assert table.columns == ["url", "id", "text", "embedding"]
    assert table.select("id", "text", "url").rows() == frame.select("id", "text", "url").rows()
    np.testing.assert_array_equal(table["embedding"].to_numpy(), expected(frame["text"].to_list()))
    table = keeping("all", f"in.{suffix}")
    assert table.columns == ["id", "url", "tags", "text", "embedding"]
    assert table["tags"].to_list() == [row["tags"] for row in rows]
    assert keeping("text,id", f"in.{suffix}").columns == ["id", "text", "embedding"]


def test_columns_of_shards_and_of_rows_that_lack_them(workspace: Path) -> None:
    """Texts of another column, chunks over the ends of files, numbers and texts under one name."""
    Path("in").mkdir()
    for shard in range(3):
        rows = [{"body": f"text {shard}{row}", "n": row if shard else str(row)} for row in range(3)]
        Path(f"in/{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"body": "x"}]))
    table = keeping("all", "in", "body")
    assert table.columns == ["n", "text", "embedding"]
    assert table["n"].to_list() == ["0", "1", "2", None] * 3
    assert table["text"].to_list() == list(open_texts(Path("in"), "body"))


def test_columns_that_cannot_be_kept(workspace: Path) -> None:
    write()
    pl.DataFrame({"body": ["a"], "text": ["b"], "embedding": [1.0]}).write_parquet("in.parquet")
    pl.DataFrame({"text": ["b"], "n": [1]}).write_csv("in.csv")
    for arguments, problem in [
        (("id", "in.txt"), "keep: in.txt: a .txt file has no columns"),
        (("id", "in.parquet"), r"keep: in.parquet: no column 'id' \(columns there: body, text, embedding\)"),
        (("id,n", "in.csv"), r"keep: in.csv: no column 'id' \(columns there: text, n\)"),
        (("all", "in.parquet"), "keep: 'embedding' is a column that encode writes"),
        (("text", "in.parquet", "body"), "keep: 'text' is a column that encode writes"),
    ]:
        with pytest.raises(SourceError, match=problem):
            keeping(*arguments)
    with pytest.raises(SourceError, match=r"output: out\.npy holds no columns"):
        encode("out.npy", source="in.csv", kept=kept_columns(open_texts(Path("in.csv")), "n"))


# --- truncated and quantised ----------------------------------------------------------------------------------------


def test_the_first_dimensions_at_length_one(workspace: Path) -> None:
    texts = write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    assert encode("out.npy", storage=Storage(truncate_dim=2)) == (10, 2, 8, 0)  # what was embedded before serves
    first = expected(texts)[:, :2]
    np.testing.assert_allclose(np.load("out.npy"), first / np.linalg.norm(first, axis=1, keepdims=True), rtol=1e-6)
    encode("out.parquet", storage=Storage(truncate_dim=2))
    assert pl.read_parquet("out.parquet")["embedding"].dtype == pl.Array(pl.Float32, 2)
    assert "truncated or quantised" in str(not_made_by(LengthEncoder(), Path("out.parquet")))  # type: ignore[arg-type]


@pytest.mark.parametrize("truncate_dim", [0, WIDTH + 1])
def test_dimensions_that_are_not_there(workspace: Path, truncate_dim: int) -> None:
    write()
    with pytest.raises(SourceError, match=f"truncate_dim: {truncate_dim} of 3 dimensions: must be between 1 and 3"):
        encode("out.npy", storage=Storage(truncate_dim=truncate_dim))


def test_int8_over_the_range_of_all_texts(workspace: Path) -> None:
    # Lengths 1, 64, 256; characters 97, 197, 352: ranges of 255, so one step is one. The third dimension is constant.
    Path("in.txt").write_text("a\n" * 6 + f"{chr(197) * 64}\n{chr(352) * 256}\n")
    encode("out.npy", storage=Storage(quantize="int8"))
    found = np.load("out.npy")
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found[5:], [[-128] * 3, [63 - 128, 100 - 128, -128], [127, 127, -128]])
    ranges = [[1, 97, 1], [256, 352, 1]]
    np.testing.assert_array_equal(np.load("out.ranges.npy"), ranges)
    encode("out.parquet", storage=Storage(quantize="int8"))
    assert pl.read_parquet("out.parquet")["embedding"].to_list() == found.tolist()
    said = json.loads(pq.read_schema("out.parquet").metadata[EMBEDDED_BY])["storage"]
    assert said == {"quantize": "int8", "truncate_dim": None, "ranges": ranges}


def test_binary_keeps_the_signs(workspace: Path) -> None:
    Path("in.txt").write_text("a\nbb\n")

    class Signs(LengthEncoder):
        def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
            return Embedded(np.array([[1, -1, 1], [-1, 1, -1]], np.float32), 0)

    assert encode("out.npy", Signs(), storage=Storage(quantize="binary")) == (2, 1, 0, 0)
    np.testing.assert_array_equal(np.load("out.npy"), [[0b10100000 - 128], [0b01000000 - 128]])
    assert not Path("out.ranges.npy").exists()


@pytest.mark.parametrize("output", ["out.npy", "out.parquet"])
def test_after_an_interruption_it_goes_on_and_ends_in_the_same_bytes(workspace: Path, output: str) -> None:
    write()
    encode(output)
    whole = Path(output).read_bytes()
    Path(output).unlink()
    with pytest.raises(KeyboardInterrupt):
        encode(output, LengthEncoder(fail_at=2))
    assert not Path(output).exists()
    assert len(parts()) == 2
    encoder = LengthEncoder()
    assert encode(output, encoder) == (10, WIDTH, 8, 0)
    assert [len(call) for call in encoder.calls] == [2]
    assert Path(output).read_bytes() == whole


def test_a_torn_part_is_noticed_and_made_again(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    parts()[0].write_bytes(parts()[0].read_bytes()[:-1])
    encoder = LengthEncoder()
    encode("out.npy", encoder)
    assert "is damaged" in caplog.text
    assert [len(call) for call in encoder.calls] == [4, 2]
    np.testing.assert_array_equal(np.load("out.npy"), expected(texts))


def test_what_changed_since_is_embedded_again_and_no_more(workspace: Path) -> None:
    texts = write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    texts[5] = "another text"
    texts.append("and one more")
    Path("in.txt").write_text("\n".join(texts))
    encoder = LengthEncoder()
    encode("out.npy", encoder)
    assert encoder.calls == [texts[4:8], texts[8:]]
    np.testing.assert_array_equal(np.load("out.npy"), expected(texts))


def test_other_conditions_share_no_part(workspace: Path) -> None:
    write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    assert encode("out.npy", instruction="Say: ").kept == 0
    assert encode("out.npy", batch_tokens=7).kept == 0
    assert encode("out.npy").kept == 8


# Two folders with the same tensors can differ in each of these.
READING = [
    {"max_query_tokens": 8}, {"template": "chat"}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"compression_tokens": 2, "thought_tokens": 1},
]  # fmt: skip


def reading(change: dict[str, Any]) -> Any:
    """The same weights, which read texts in another way."""
    encoder: Any = LengthEncoder()
    encoder.config = CONFIG.model_copy(update=change)
    return encoder


@pytest.mark.parametrize("change", READING, ids=lambda change: next(iter(change)))
def test_encoders_that_read_texts_otherwise_share_nothing(workspace: Path, change: dict[str, Any]) -> None:
    write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=2))
    assert encode("out.npy", reading(change)).kept == 0
    assert encode("out.npy", reading({"teacher": {"name": "t"}, "origin": {"format": "f"}})).kept == 8
    encode("out.parquet")
    assert "another encoder" in str(not_made_by(reading(change), Path("out.parquet")))


def test_it_is_told_what_embeddings_of_a_file_are(workspace: Path) -> None:
    write()
    encode("out.parquet", instruction="I")
    out, encoder = Path("out.parquet"), LengthEncoder()
    assert not_made_by(encoder, out) is not_made_by(encoder, out, "I") is None  # type: ignore[arg-type]
    assert not_made_by(encoder, out, "") == "holds embeddings with another instruction"  # type: ignore[arg-type]
    table = pq.read_table(out)
    for metadata in (b"{", b"[]", b"7", b"{}", b'{"encoder": 1}', b"\xff", b'"text"'):
        pq.write_table(table.replace_schema_metadata({EMBEDDED_BY: metadata}), out)
        said = not_made_by(encoder, out, "I")  # type: ignore[arg-type]
        assert said is not None
        assert "metadata is damaged" in said or "another encoder" in said
    pq.write_table(table.drop_columns(["embedding"]), out)
    assert not_made_by(encoder, out) == "holds no embeddings that encode wrote"  # type: ignore[arg-type]
    pq.write_table(table.replace_schema_metadata(None), out)
    assert not_made_by(encoder, out) == "holds no embeddings that encode wrote"  # type: ignore[arg-type]


def test_embeddings_back_in_the_teachers_space_are_others(workspace: Path) -> None:
    write()
    behind: Any = reading({"transform": {"kind": "center", "sha256": "x"}})
    encode("out.parquet", behind, space="teacher")
    assert "in the teacher's space" in str(not_made_by(behind, Path("out.parquet")))
    encode("out.parquet", behind)
    assert not_made_by(behind, Path("out.parquet")) is None


def test_a_prompt_that_no_tokenizer_reads(workspace: Path) -> None:
    """As from a terminal that is not in UTF-8."""
    write()
    with pytest.raises(SourceError, match=r"prompt: holds '\\udce9' at character 3, half of a surrogate pair"):
        encode("out.npy", instruction="caf\udce9")


def test_a_folder_as_the_output_is_refused_before_the_work(workspace: Path) -> None:
    write()
    Path("out.npy").mkdir()
    encoder = LengthEncoder()
    with pytest.raises(SourceError, match=r"output: out\.npy is a folder: give the name of a file"):
        encode("out.npy", encoder)
    assert encoder.calls == []


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_the_input_is_not_overwritten(workspace: Path, link: Callable[..., None] | None) -> None:
    pl.DataFrame({"text": ["a", "b"]}).write_parquet("in.parquet")
    before, output = Path("in.parquet").read_bytes(), "./in.parquet" if link is None else "out.parquet"
    if link is not None:
        link(Path(output), Path("in.parquet").resolve())
    with pytest.raises(SourceError, match="output: .* is read itself"):
        encode(output, source="in.parquet")
    assert Path("in.parquet").read_bytes() == before


def test_texts_that_were_cut_are_counted(workspace: Path) -> None:
    texts = write()
    long = [len(text) > 9 for text in texts]
    assert encode("out.npy").truncated == sum(long) > 0
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=1))
    again = encode("out.npy")
    assert (again.kept, again.truncated) == (4, sum(long[4:]))


def test_an_input_that_changes_meanwhile_is_refused(workspace: Path) -> None:
    write()

    class Careless(LengthEncoder):
        def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
            Path("in.txt").write_text("".join(f"other {row}\n" for row in range(10)))
            return super().embed(texts, **options)

    with pytest.raises(SourceError, match=r"in\.txt changed while it was embedded"):
        encode("out.npy", Careless())
    assert not Path("out.npy").exists()
    assert not list(Path().glob(".out*"))


def test_two_at_the_same_work(workspace: Path) -> None:
    write()
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", LengthEncoder(fail_at=1))
    lock = lock_folder(parts()[0].parent)
    with pytest.raises(WorkError, match="in use by another process"):
        encode("out.npy")
    lock.release()
    encode("out.npy")


def test_memory_does_not_grow_with_the_file(workspace: Path) -> None:
    class Forgetful(LengthEncoder):
        def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
            return Embedded(expected(texts), 0)

    def peak(rows: int) -> int:
        Path("in.txt").write_text("".join(f"text {row:09d} {'x' * 200}\n" for row in range(rows)))
        tracemalloc.start()
        encode_file(Forgetful(), open_texts(Path("in.txt")), Path("out.npy"), chunk_rows=200)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small = peak(1000)
    assert peak(10_000) < 2 * small + 2**20


SCRIPT = """
import sys, time
from pathlib import Path
from tests.encoder.test_encode_file import LengthEncoder, encode

class Slow(LengthEncoder):
    def embed(self, texts, **options):
        time.sleep(0.1)
        return super().embed(texts, **options)

encode("out.parquet", Slow())
"""


@pytest.mark.slow
def test_kill_9_and_again(workspace: Path) -> None:
    write(100)
    encode("whole.parquet")
    Path("run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "run.py"], env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(parts()) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("out.parquet").exists()
    made = len(parts())
    assert 3 <= made < 25
    assert encode("out.parquet").kept == 4 * made
    assert Path("out.parquet").read_bytes() == Path("whole.parquet").read_bytes()


@pytest.fixture
def encoder_folder(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    from tests.export.test_merged import write_model

    return write_model(tiny_backbone("llama"))


def test_a_real_encoder_in_chunks_is_the_encoder(encoder_folder: Path) -> None:
    from pipeline.encoder.folder.read import read_encoder

    texts = write()
    encoder = read_encoder(encoder_folder)
    encode_file(encoder, open_texts(Path("in.txt")), Path("out.npy"), chunk_rows=4)
    np.testing.assert_allclose(np.load("out.npy"), encoder.encode(texts), atol=1e-5)


def test_the_mean_of_the_texts_is_subtracted_and_stored(workspace: Path) -> None:
    Path("in.txt").write_text("a\nccc\n")  # 1 97 1 and 3 99 1: their mean is 2 98 1
    encode("out.parquet", center="corpus")
    stored = np.stack(pl.read_parquet("out.parquet")["embedding"].to_numpy())
    np.testing.assert_array_equal(stored, [[-1, -1, 0], [1, 1, 0]])
    said = json.loads(pq.read_schema("out.parquet").metadata[EMBEDDED_BY])["center"]
    assert said["mean"] == [2.0, 98.0, 1.0]
    assert said["sha256"] == hashlib.sha256(np.array([2, 98, 1], np.float32).tobytes()).hexdigest()
    encode("out.npy", center="corpus")
    np.testing.assert_array_equal(np.load("out.npy"), stored)
    np.testing.assert_array_equal(np.load("out.center.npy"), [2, 98, 1])


@pytest.mark.parametrize("center", ["out.parquet", "out.center.npy"])
def test_queries_are_centred_with_the_stored_mean(workspace: Path, center: str) -> None:
    Path("in.txt").write_text("a\nccc\n")
    encode(center.replace(".center", ""), center="corpus")
    Path("queries.txt").write_text("bb\n")
    encode("queries.parquet", source="queries.txt", center=center)
    assert pl.read_parquet("queries.parquet")["embedding"].to_list() == [[0.0, 0.0, 0.0]]
    encode("queries.npy", source="queries.txt", center=center)
    assert not Path("queries.center.npy").exists()


@pytest.mark.parametrize(
    ("name", "options"), [("center", {"center": "corpus"}), ("ranges", {"storage": Storage(quantize="int8")})]
)
def test_files_of_two_runs_do_not_lie_side_by_side(workspace: Path, name: str, options: dict[str, Any]) -> None:
    Path("in.txt").write_text("a\nccc\n")
    beside = Path(f"out.{name}.npy")
    encode("out.npy", **options)
    first = {path: path.read_bytes() for path in (Path("out.npy"), beside)}
    with pytest.raises(SourceError, match=rf"output: out\.{name}\.npy"):
        encode("out.npy")
    assert {path: path.read_bytes() for path in first} == first
    encode("out.parquet")
    encode("out.npy", **options)
    assert {path: path.read_bytes() for path in first} == first
    beside.unlink()
    encode("out.npy")
    assert not beside.exists()


def test_a_kill_leaves_no_embeddings_beside_the_mean_of_others(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in.txt").write_text("a\nccc\n")
    encode("out.npy", center="corpus")
    Path("in.txt").write_text("bb\n")
    monkeypatch.setattr("pipeline.core.part_store.fsync_path", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy", center="corpus")
    np.testing.assert_array_equal(np.load("out.center.npy"), [2, 98, 1])
    assert not Path("out.npy").exists()


def test_a_kill_before_plain_embeddings_are_replaced_leaves_the_old_ones(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in.txt").write_text("a\nccc\n")
    encode("out.npy")
    before = Path("out.npy").read_bytes()
    Path("in.txt").write_text("bb\n")
    monkeypatch.setattr("pipeline.core.part_store.fsync_path", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode("out.npy")
    assert Path("out.npy").read_bytes() == before


def test_centring_comes_before_truncation(workspace: Path) -> None:
    Path("in.txt").write_text("a\nccc\n")
    encode("out.npy", center="corpus", storage=Storage(truncate_dim=2))
    np.testing.assert_allclose(np.load("out.npy"), np.array([[-1, -1], [1, 1]]) / np.sqrt(2), rtol=1e-6)
    assert np.load("out.center.npy").shape == (3,)


@pytest.mark.parametrize(
    ("center", "problem"),
    [
        ("corpora", "corpora cannot be read"),
        ("in.txt", r"in\.txt cannot be read"),
        ("plain.parquet", r"plain\.parquet holds no mean"),
        ("other.parquet", "by another encoder"),
        ("behind.parquet", "in another space"),
        ("plain.npy", r"shape \[2, 3\], the mean has \[3\]"),
        ("torn.parquet", r"torn\.parquet cannot be read"),
        ("words.npy", r"words\.npy holds what is no finite number"),
        ("nan.npy", r"nan\.npy holds what is no finite number"),
    ],
)
def test_a_mean_that_is_none_of_the_encoders(workspace: Path, center: str, problem: str) -> None:
    Path("in.txt").write_text("a\nccc\n")
    encode("plain.parquet")
    encode("plain.npy")
    encode("other.parquet", reading({"max_query_tokens": 8}), center="corpus")
    encode("behind.parquet", space="teacher", center="corpus")
    encode("torn.parquet", center="corpus")
    np.save("words.npy", np.array(["a", "b", "c"]))
    np.save("nan.npy", np.array([1, np.nan, 1], np.float32))
    table = pq.read_table("torn.parquet")
    said = table.schema.metadata[EMBEDDED_BY].replace(b"98.0", b"97.0")
    pq.write_table(table.replace_schema_metadata({EMBEDDED_BY: said}), "torn.parquet")
    with pytest.raises(SourceError, match=f"center: .*{problem}.*: give corpus, or a file"):
        encode("out.npy", center=center)
    assert not Path("out.npy").exists()


def test_centred_embeddings_are_others(workspace: Path) -> None:
    write()
    encode("out.parquet", center="corpus")
    encoder: Any = LengthEncoder()
    assert not_made_by(encoder, Path("out.parquet")) == "holds centred embeddings (encode --center)"
    assert not_made_by(encoder, Path("out.parquet"), centered=True) is None
