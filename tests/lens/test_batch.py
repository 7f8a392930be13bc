"""The command decode, from texts, files and stored soft prompts, to the terminal, a table and a page."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import pipeline.lens.batch as writing
from pipeline.__main__ import app
from pipeline.core.artifacts import read_manifest
from pipeline.core.part_store import Parts
from pipeline.core.text import visible
from pipeline.embed.teachers.stub import HashTeacher
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.inference import Encoder
from pipeline.lens import decode, decode_soft_prompts
from pipeline.lens.batch import PAGE_ROWS, render_page, token
from pipeline.lens.nearest import Index, nearest, open_index
from pipeline.lens.reading import ROWS, Entries, Lens, outputs_for_texts
from tests.encoder.test_inference import write
from tests.export.encoder_folders import write_folder
from tests.lens.test_nearest import write_embedded
from tests.probe.test_alignment import write_heldout

EVIL = "</td><script>alert(1)</script>\x1b[31m\x07 & <b>"


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["decode", "--model", "enc", *map(str, arguments)])


def works(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(message: str, *arguments: object) -> None:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture
def encoder(workspace: Path, tiny_backbone: Callable[..., Path]) -> Encoder:
    """In the folder `enc`; width 5, hidden size 32, two compression tokens and one thought token."""
    write(Path("enc"), tiny_backbone("llama"), None)
    return read_encoder(Path("enc"))


def test_one_answer_a_text_is_printed(encoder: Encoder) -> None:
    expected = decode(encoder, ["one", "two"], max_new_tokens=4)
    printed = works("one", "two", "--max-new-tokens", 4).stdout
    assert printed == "".join(f"{visible(answer)}\n" for answer in expected)


def test_no_answer_commands_the_terminal(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.lens.decoding._decode_batch", lambda *_: ["safe\x1b[2Jtext\x07\r\u202eb"])
    assert works("one").stdout == "safe[2Jtextb\n"


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_stored_soft_prompts_decode_as_their_texts(encoder: Encoder, suffix: str) -> None:
    soft = encoder.soft_prompts(["one", "two"])
    if suffix == "npy":
        np.save("soft.npy", soft)
    else:
        pl.DataFrame({"soft_prompts": soft.tolist()}).write_parquet("soft.parquet")
    stored = works("--soft-prompts", f"soft.{suffix}", "--max-new-tokens", 4).stdout
    assert stored == works("one", "two", "--max-new-tokens", 4).stdout
    works("--soft-prompts", f"soft.{suffix}", "--max-new-tokens", 4, "--output", "o.parquet")
    rows = pl.read_parquet("o.parquet")
    assert rows["decoded"].to_list() == decode_soft_prompts(encoder, soft, max_new_tokens=4)
    assert rows["query"].to_list() == rows["vocabulary"].to_list() == [None, None]
    assert rows["id"].n_unique() == 2


def test_stored_soft_prompts_of_an_encoder_that_pools_the_text_are_printed(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    """What is printed needs no embedding, and only embeddings need the texts."""
    write_folder(Path("enc"), tiny_backbone("llama"), template="echo", pool="text", max_query_tokens=200)
    np.save("soft.npy", read_encoder(Path("enc")).soft_prompts(["one"]))
    stored = works("--soft-prompts", "soft.npy", "--max-new-tokens", 4).stdout
    assert stored == works("one", "--max-new-tokens", 4).stdout
    fails("(pool: text) need the texts", "--soft-prompts", "soft.npy", "--output", "o.parquet")


def teacher_params() -> None:
    params = {
        "backbone": {"name": "b"},
        "embed": {"teacher": {"kind": "hash", "options": {"width": 5}}},
    }
    Path("p.yaml").write_text(json.dumps(params))


def test_all_that_can_be_read_of_a_file(encoder: Encoder) -> None:
    teacher_params()
    texts = ["one", "second text", "three", EVIL]
    pl.DataFrame({"q": texts, "r": ["1", "2", "3", EVIL]}).write_ndjson("in.jsonl")
    write_embedded(Path("c.parquet"), ["up", EVIL], [[0, 2, 0, 0, 0], [1, 0, 0, 0, 0]], encoder)
    options = ["--input", "in.jsonl", "--column", "q", "--response-column", "r", "--corpus", "c.parquet", "-k", 1]
    more = ["--faithfulness", "--params", "p.yaml", "--vocabulary", 3, "--max-new-tokens", 4, "--html", "page.html"]
    said = works(*options, *more, "--output", "o.parquet").stdout
    assert "4 texts read -> o.parquet" in said
    assert re.search(r"to its embedding: -?0\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\], shuffled pairs", said)
    assert "to the real response" in said
    table = pq.read_table("o.parquet")
    assert table.schema.equals(ROWS)
    rows = table.to_pylist()
    read = [row["query"] for row in rows]
    assert read[:3] == texts[:3]
    assert [row["decoded"] for row in rows] == decode(encoder, read, max_new_tokens=4)
    assert all([len(row["vocabulary"]), len(row["vocabulary"][0]), len(row["nearest"])] == [2, 3, 1] for row in rows)
    embeddings = encoder.encode(read)
    wanted = ["up" if row[1] > row[0] else EVIL for row in embeddings]
    assert [row["nearest"][0]["text"] for row in rows] == wanted
    assert all(row["cosine_embedding"] is not None and row["cosine_response"] is not None for row in rows)


def test_killed_and_run_again_it_goes_on(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writing.CHUNK_ROWS, "cpu", 2)
    Path("in.txt").write_text("".join(f"text {row}\n" for row in range(5)))
    options = ["--input", "in.txt", "--max-new-tokens", 3]
    works(*options, "--output", "whole.parquet")
    put, made = Parts.put, []

    def dies_after_one(parts: Parts, place: int, *content: Any) -> Path:
        if made:
            raise KeyboardInterrupt
        made.append(place)
        return put(parts, place, *content)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", dies_after_one)
        assert call(*options, "--output", "o.parquet").exit_code != 0
    assert not Path("o.parquet").exists()
    assert (
        "5 texts read -> o.parquet (2 of them from the run before)" in works(*options, "--output", "o.parquet").stdout
    )
    assert Path("o.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not list(Path(".work/decode").glob("*/*.parquet"))


def assert_close(found: object, expected: object) -> None:
    """Equal but for the rounding of floats, which depends on how many texts are encoded at once."""
    if isinstance(found, dict | list) and isinstance(expected, dict | list):
        first, second = ([*each.values()] if isinstance(each, dict) else each for each in (found, expected))
        for pair in zip(first, second, strict=True):
            assert_close(*pair)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_torn_part_is_read_again(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writing.CHUNK_ROWS, "cpu", 1)
    options = ["one", "two", "--output", "o.parquet", "--max-new-tokens", 2]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "whole_file", killed)
        assert call(*options).exit_code != 0
    first, _ = sorted(Path(".work/decode").glob("*/*.parquet"))
    first.write_bytes(first.read_bytes()[:-9])
    assert "(1 of them from the run before)" in works(*options).stdout
    assert pl.read_parquet("o.parquet")["query"].to_list() == ["one", "two"]


def test_an_encoder_that_reads_texts_otherwise_takes_over_nothing(
    encoder: Encoder, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["a text that is long enough", "--output", "o.parquet", "--max-new-tokens", 2]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "whole_file", killed)
        assert call(*options).exit_code != 0
    shutil.rmtree("enc")
    write(Path("enc"), tiny_backbone("llama"), None, max_query_tokens=9)
    assert read_encoder(Path("enc")).identity == encoder.identity
    assert "from the run before" not in works(*options).stdout


class Counted:
    """Counts how often an index is gone through; `stop` interrupts that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: bool = False) -> None:
        self.passes = 0

        def opened(path: Path) -> Index:
            index = open_index(path)

            def vectors() -> Iterator[np.ndarray]:
                self.passes += 1
                if stop:
                    raise KeyboardInterrupt
                return index.vectors()

            return replace(index, vectors=vectors)

        monkeypatch.setattr("pipeline.lens.batch.open_index", opened)


def test_a_corpus_is_gone_through_once_for_all_chunks(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    write_embedded(
        Path("c.parquet"), [f"known {row}" for row in range(9)], random.normal(size=(9, 5)).tolist(), encoder
    )
    texts = [f"text {row}" for row in range(7)]
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts))
    options = ["--input", "in.txt", "--corpus", "c.parquet", "-k", 3, "--max-new-tokens", 2, "--output"]
    with monkeypatch.context() as patch:
        once = Counted(patch)
        works(*options, "once.parquet")
    assert once.passes == 1  # seven rows are one chunk here
    monkeypatch.setitem(writing.CHUNK_ROWS, "cpu", 1)
    with monkeypatch.context() as patch:
        chunked = Counted(patch)
        works(*options, "o.parquet")
    assert chunked.passes == 1
    table = pq.read_table("o.parquet")
    assert table.schema.equals(ROWS)
    assert_close(table.to_pylist(), pq.read_table("once.parquet").to_pylist())
    embeddings = encoder.encode(texts)
    expected = [[near.text for near in row] for row in nearest(embeddings, open_index(Path("c.parquet")), 3)]
    assert [[near["text"] for near in row["nearest"]] for row in table.to_pylist()] == expected
    monkeypatch.setattr(writing, "GROUP_ROWS", 3)
    with monkeypatch.context() as patch:
        grouped = Counted(patch)
        works(*options, "groups.parquet")
    assert grouped.passes == 3  # of 3, 3 and 1 rows
    assert Path("groups.parquet").read_bytes() == Path("o.parquet").read_bytes()


def test_killed_in_the_search_it_goes_on_there(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writing.CHUNK_ROWS, "cpu", 1)
    monkeypatch.setattr(writing, "GROUP_ROWS", 2)
    write_embedded(Path("c.parquet"), ["up", "right"], [[0, 2, 0, 0, 0], [1, 0, 0, 0, 0]], encoder)
    options = ["one", "two", "three", "--corpus", "c.parquet", "--max-new-tokens", 2, "--output"]
    works(*options, "whole.parquet")
    with monkeypatch.context() as patch:
        Counted(patch, stop=True)
        assert call(*options, "o.parquet").exit_code != 0
    assert not Path("o.parquet").exists()
    put = Parts.put

    def dies_after_the_first_group(parts: Parts, place: int, *content: Any) -> Path:
        if place:
            raise KeyboardInterrupt
        return put(parts, place, *content)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", dies_after_the_first_group)
        assert call(*options, "o.parquet").exit_code != 0
    with monkeypatch.context() as patch:
        again = Counted(patch)
        assert "3 of them from the run before" in works(*options, "o.parquet").stdout
    assert again.passes == 1  # the second group's
    assert Path("o.parquet").read_bytes() == Path("whole.parquet").read_bytes()


def test_a_last_chunk_of_one_row_leaves_the_chance_figure(encoder: Encoder) -> None:
    teacher_params()
    Path("in.txt").write_text("".join(f"text {row}\n" for row in range(65)))
    options = ["--input", "in.txt", "--faithfulness", "--params", "p.yaml", "--vocabulary", 0, "--max-new-tokens", 1]
    said = works(*options, "--output", "o.parquet").stdout
    assert re.search(r"to its embedding: .*, shuffled pairs -?0\.\d{3}", said)
    chances = pl.read_parquet("o.parquet")["chance_embedding"]
    assert (len(chances), chances.null_count(), chances[64]) == (65, 1, None)


def test_what_is_read_is_not_overwritten(encoder: Encoder) -> None:
    pl.DataFrame({"text": ["a"]}).write_parquet("in.parquet")
    write_embedded(Path("c.parquet"), ["x"], [[0, 2, 0, 0, 0]], encoder)
    pl.DataFrame({"soft_prompts": encoder.soft_prompts(["a"]).tolist()}).write_parquet("soft.parquet")
    Path("link.parquet").symlink_to("in.parquet")
    files = ("in.parquet", "c.parquet", "soft.parquet")
    before = [Path(name).read_bytes() for name in files]
    fails("--output: in.parquet is read itself", "--input", "in.parquet", "--output", "in.parquet")
    fails("--output: link.parquet is read itself", "--input", "in.parquet", "--output", "link.parquet")
    fails("soft.parquet is read itself", "--soft-prompts", "soft.parquet", "--output", "./soft.parquet")
    fails("c.parquet is read itself", "x", "--corpus", "c.parquet", "--output", "c.parquet")
    Path("d.html").mkdir()
    fails("--html: d.html is a folder: give the name of a file", "x", "--output", "o.parquet", "--html", "d.html")
    assert [Path(name).read_bytes() for name in files] == before


def test_mistakes_come_before_the_model_is_loaded(workspace: Path) -> None:
    Path("in.txt").write_text("x\n")
    Path("in.csv").write_text("text,r\nx,1\n")
    fails("nothing given: give one of TEXT, --input, --soft-prompts")
    fails("TEXT and --input given", "x", "--input", "in.txt")
    fails("--output: o.csv must end in .parquet", "x", "--output", "o.csv")
    fails("--html: p.txt must end in .html", "x", "--output", "o.parquet", "--html", "p.txt")
    fails("--html: needs --output too", "x", "--html", "p.html")
    fails("--engine: unknown value 'llama'", "x", "--engine", "llama")
    fails("--response-column: in.txt: a .txt file has no columns", "--input", "in.txt", "--response-column", "r")
    fails("no column 'gone' (columns there: text, r)", "--input", "in.csv", "--response-column", "gone")
    fails("enc is not an encoder", "x")
    fails("enc is not an encoder", "--soft-prompts", "in.txt")
    fails("--corpus: needs --output too", "x", "--corpus", "data")
    fails("--faithfulness: needs --output too", "x", "--faithfulness")
    fails("gone.yaml does not exist", "x", "--faithfulness", "--params", "gone.yaml", "--output", "o.parquet")


def test_mistakes_of_a_corpus_and_a_teacher(encoder: Encoder) -> None:
    teacher_params()
    np.save("soft.npy", np.zeros((1, 2, 7), np.float32))
    fails("vectors of 7 dimensions, the backbone's have 32", "--soft-prompts", "soft.npy")
    corpus = ["x", "--output", "o.parquet", "--corpus", "c.parquet"]
    write_embedded(Path("c.parquet"), ["x"], [[0, 2]], encoder)
    fails("vectors of 2 dimensions, the encoder's have 5", *corpus)
    write_embedded(Path("c.parquet"), ["x"], [[0, 2, 0, 0, 0]])
    fails("--corpus: c.parquet holds no embeddings that encode wrote", *corpus)
    write_embedded(Path("c.parquet"), ["x"], [[0, 2, 0, 0, 0]], encoder.untrained(0))
    fails("--corpus: c.parquet holds embeddings by another encoder", *corpus)
    Path("p.yaml").write_text(Path("p.yaml").read_text().replace('"width": 5', '"width": 4'))
    message = "embed.teacher: it gives vectors of 4 dimensions, the encoder was trained for one of 5"
    fails(message, "x", "--output", "o.parquet", "--faithfulness", "--params", "p.yaml")


def test_another_teacher_than_the_recorded_one_is_refused(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    """It has the same width."""
    teacher_params()
    options = ["x", "--output", "o.parquet", "--faithfulness", "--params", "p.yaml", "--max-new-tokens", 1]
    config = Path("enc/encoder_config.json")

    def record(teacher: dict[str, Any]) -> None:
        config.write_text(json.dumps({**json.loads(config.read_text()), "teacher": teacher}))

    record({"name": "org/theirs"})
    works(*options)
    assert "cannot tell whether teacher hash is the one of the encoder, org/theirs" in caplog.text
    caplog.clear()
    record(HashTeacher(5).identity)
    works(*options)
    assert "cannot tell" not in caplog.text
    record({"kind": "sentence-transformers", "name": "org/t", "revision": "main"})
    fails("embed.teacher: another teacher than that of the encoder: its kind is 'hash'", *options)


def test_targets_of_another_teacher_or_transform_are_no_known_texts(encoder: Encoder) -> None:
    """They have the same width."""
    write_heldout(width=5)
    made_by = read_manifest(Path("data/targets")).manifest.models["teacher"]
    options = ["x", "--output", "o.parquet", "--corpus", "data", "--max-new-tokens", 1]
    config = Path("enc/encoder_config.json")

    def record(teacher: dict[str, Any], transform: dict[str, str] | None = None) -> None:
        facts = {"teacher": teacher, "transform": transform}
        config.write_text(json.dumps(json.loads(config.read_text()) | facts))

    record(made_by)
    works(*options)
    assert [near["id"] for near in pl.read_parquet("o.parquet")["nearest"][0]] != []
    record({"kind": "sentence-transformers", "name": "org/t", "revision": "main"})
    fails("--corpus: data/targets is of another teacher than the encoder's (its kind is", *options)
    record(made_by, {"kind": "whiten", "sha256": "0"})
    fails("--corpus: data/targets is not transformed, the encoder's targets were whiten", *options)


class Tags(HTMLParser):
    """Every tag, and every address that a browser would ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses |= {value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")}


def read_rows(encoder: Encoder, texts: list[str]) -> object:
    lens = Lens(encoder, lambda soft: [EVIL] * len(soft), vocabulary=4)
    nothing = [None] * len(texts)
    return lens.read(
        Entries([str(row) for row in range(len(texts))], texts, nothing), outputs_for_texts(encoder, texts)
    )


def test_no_text_breaks_out_of_the_page(encoder: Encoder) -> None:
    page = render_page(read_rows(encoder, [EVIL]), 1, {}, EVIL)  # type: ignore[arg-type]
    seen = Tags(page)
    assert not seen.tags & {"script", "b", "img", "iframe", "base", "form"}
    assert seen.addresses == {"data:,"}
    assert not re.search(r"url\(|@import|https?:", page)
    assert not [char for char in page if not char.isprintable() and char != "\n"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[31m" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_a_page_shows_the_first_rows_and_says_so(encoder: Encoder) -> None:
    rows = read_rows(encoder, [f"text {row}" for row in range(PAGE_ROWS + 1)])
    page = render_page(rows, 4321, {}, "t")  # type: ignore[arg-type]
    assert page.count('data-name="decoded"') == PAGE_ROWS
    assert f"The first {PAGE_ROWS} of 4,321 rows." in page


def test_white_space_of_a_word_is_shown() -> None:
    assert [token(text) for text in (" the", "\n", "\x1b", "")] == ["␣the", "⏎", "∅", "∅"]
