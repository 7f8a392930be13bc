"""Few queries: of those that were collected, or of the first rows of the sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.collect.params import CollectParams
from pipeline.core.artifacts import create
from pipeline.core.errors import SourceError
from pipeline.core.paths import QUERIES_DIR
from pipeline.core.schemas import QUERIES
from pipeline.preview.queries import Few, few_queries
from tests.toy_workspace import table

Ask = Callable[..., Few]


@pytest.fixture
def ask(workspace: Path, tiny_backbone: Callable[..., Path]) -> Ask:
    """`ask(texts, count)`: the texts as the only source."""
    backbone = BackboneParams(name=str(tiny_backbone("llama")))

    def asked(texts: list[str], count: int, **changes: Any) -> Few:
        Path("sources").mkdir(exist_ok=True)
        Path("sources/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = {"kind": "local", "path": "a.jsonl"}
        params = CollectParams.model_validate({"local_dir": "sources", "sources": [source], **changes})
        scratch = Path("scratch")
        scratch.mkdir()
        return few_queries(params, backbone, count, scratch)

    return asked


def test_the_first_rows_of_a_source_are_filtered_as_collect_does(ask: Ask) -> None:
    found = ask(["one text", "x", "one text", "two texts", "long " * 9], 5, min_chars=3, max_chars=20)
    assert set(found.table["text"].to_pylist()) == {"one text", "two texts"}
    assert found.table.schema == QUERIES
    assert "read 5" in found.origin and "duplicate 1" in found.origin and "too_long 1" in found.origin


def test_no_more_of_a_source_is_read_than_needed(ask: Ask) -> None:
    found = ask([f"text number {number}" for number in range(200)], 2)
    assert found.table.num_rows == 2
    assert "read 64, sampled_out 62" in found.origin


def test_collected_queries_of_the_same_params_are_sampled(ask: Ask) -> None:
    collected = [{"id": f"{number:02}", "text": f"stored {number}", "source": "s"} for number in range(9)]
    params = CollectParams.model_validate({"local_dir": "sources", "sources": [{"kind": "local", "path": "a.jsonl"}]})
    with create(QUERIES_DIR, kind="queries", params=params.model_dump(mode="json")) as out:
        out.write_table("train.parquet", table(collected, QUERIES))
    found = ask(["one text", "two texts"], 4)
    assert found.table.num_rows == 4
    assert all(text.startswith("stored") for text in found.table["text"].to_pylist())
    assert found.table["id"].to_pylist() == sorted(found.table["id"].to_pylist())


def test_of_other_params_the_sources_are_read(ask: Ask) -> None:
    with create(QUERIES_DIR, kind="queries", params={"seed": 1}) as out:
        out.write_table("train.parquet", table([], QUERIES))
    assert ask(["one text", "two texts"], 4).table.num_rows == 2


def test_a_single_usable_query_is_too_few(ask: Ask) -> None:
    with pytest.raises(SourceError, match="1 usable queries"):
        ask(["one text", "x"], 4, min_chars=3)
