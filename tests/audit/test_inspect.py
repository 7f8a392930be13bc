"""Rows of an artifact, and one row through all stages."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.audit.inspect import _cell, counts, failures, show, trace
from pipeline.core.artifacts import create
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_json
from pipeline.core.schemas import RESPONSES
from tests.toy_workspace import EMPTY, FAILED, IDS, USABLE, flip_byte, make_workspace


@pytest.fixture(autouse=True)
def made(workspace: Path) -> None:
    make_workspace(Path())


def rendered(table: object) -> str:
    sink = io.StringIO()
    Console(width=300, file=sink).print(table)
    return sink.getvalue()


def test_queries_show_rows_of_each_split() -> None:
    text = rendered(show("collect", 1))
    assert "data/queries: 2 of 5 rows" in text
    assert "heldout" in text
    assert "train" in text


def test_parts_are_shown_as_one_table() -> None:
    assert show("generate", 3).row_count == 3
    assert show("generate", 99).row_count == 5


def test_counts_are_shown_by_their_names_and_zeros_are_not() -> None:
    counted = {"finish_reason": {"stop": 1234, "error": 2}, "empty_responses": 0, "errors": {"timeout": 2}}
    with create(Path("data/responses"), kind="responses", params={}) as out:
        out.write_parts([], RESPONSES)
        out.counts = counted
    text = rendered(counts("generate"))
    for expected in ("finish_reason / stop", "1,234", "finish_reason / error", "errors / timeout"):
        assert expected in text
    assert "empty" not in text
    assert counts("train") is None


def test_failed_rows_are_shown_with_their_reasons() -> None:
    table = failures("generate", 5)
    assert table is not None
    assert table.row_count == 1
    text = rendered(table)
    assert IDS[FAILED] in text
    assert "prompt too long" in text
    assert failures("embed", 5) is None


def test_targets_show_norm_and_first_values_instead_of_all() -> None:
    text = rendered(show("embed", 1))
    assert USABLE[0] in text
    assert "1.118" in text  # |(0.5, 0, -1)|
    assert "0.5000, 0.0000, -1.0000" in text


def test_train_shows_its_tensors() -> None:
    text = rendered(show("train", 5))
    assert "tokens" in text
    assert "[2, 4]" in text
    assert "2.8284" in text  # eight ones


def test_probe_shows_its_summaries() -> None:
    write_json(Path("results/probe/alignment.json"), {"systems": {"student": {"top1": 0.75}}})
    assert "0.75" in rendered(show("probe", 5))


def test_a_row_through_all_stages() -> None:
    row = next(text for text, row in IDS.items() if row == USABLE[1])
    text = rendered(trace(USABLE[1]))
    for expected in (row, "toy", f"answer to {row}", "stop", "norm", "1.5"):
        assert expected in text


def test_a_beginning_of_the_id_is_enough() -> None:
    assert USABLE[0] in rendered(trace(USABLE[0][:10]))


def test_a_failed_row_says_why_and_has_no_target() -> None:
    text = rendered(trace(IDS[FAILED]))
    assert "prompt too long" in text
    assert "no row in data/targets" in text
    assert "no row in data/targets" in rendered(trace(IDS[EMPTY]))


def test_stages_that_have_not_run_are_said_so() -> None:
    shutil.rmtree("data/targets")
    assert "not made yet" in rendered(trace(USABLE[0]))


@pytest.mark.parametrize(("row", "message"), [("xyz", "no query has id 'xyz'"), ("", "5 ids begin with ''")])
def test_an_id_that_is_not_one_row(row: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        trace(row)


def test_unknown_stage_and_stage_without_results() -> None:
    with pytest.raises(ArtifactError, match="unknown stage 'trian'"):
        show("trian", 5)
    with pytest.raises(ArtifactError, match="results/report: nothing there"):
        show("report", 5)


def test_a_damaged_table_is_one_message() -> None:
    flip_byte(Path("data/queries/train.parquet"), -1)
    with pytest.raises(ArtifactError, match="train.parquet"):
        trace(USABLE[0])


def test_text_cannot_use_markup_or_control_characters() -> None:
    assert "[red]" in rendered(_cell("[red]x[/red]"))
    assert "\x1b" not in _cell("\x1b[31m")


@pytest.mark.parametrize(
    ("stage", "file"),
    [("collect", "data/queries/train.parquet"), ("train", "models/encoder/student.safetensors")],
)
@pytest.mark.parametrize("content", [None, b"xx"])
def test_a_file_that_cannot_be_read_is_named(stage: str, file: str, content: bytes | None) -> None:
    Path(file).unlink()
    if content is not None:
        Path(file).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"^{file} cannot be read: "):
        show(stage, 1)
