"""collect, as a user runs it: params.yaml and files in, two tables and a record out; mistakes end in one message."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from pipeline.artifacts import open_artifact
from pipeline.contracts import QUERIES, check_table
from pipeline.queries import query_id
from pipeline.stages.collect import app

QUERIES_DIR = Path("data/queries")
LOCAL = {"kind": "local", "path": "queries.jsonl", "column": "text"}

Collect = Callable[..., Result]


@pytest.fixture
def collect(workspace: Path, tiny_backbone: Callable[..., Path]) -> Collect:
    """Write params.yaml with these keys of `collect` and run the stage."""
    default = tiny_backbone("llama")

    def run(backbone: Path | str = default, **keys: Any) -> Result:
        params = {"local_dir": "in", "sources": [LOCAL], "heldout_fraction": 0.2, "max_tokens": 64} | keys
        with Path("params.yaml").open("w") as file:
            YAML().dump({"backbone": {"name": str(backbone), "dtype": "float32"}, "collect": params}, file)
        return CliRunner().invoke(app, [])

    return run


def write(texts: list[str], name: str = "queries.jsonl") -> None:
    Path("in").mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("in", name).write_text(lines)


def questions(count: int) -> list[str]:
    return [f"what is {index} and why?" for index in range(count)]


def rows(split: str) -> dict[str, str]:
    table = pq.read_table(QUERIES_DIR / f"{split}.parquet", schema=QUERIES)
    check_table(table, QUERIES, split)
    return dict(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))


def failure(result: Result) -> str:
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert not QUERIES_DIR.exists()
    assert not Path("results").exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_tables_manifest_and_record(collect: Collect) -> None:
    write([*questions(100), "what is 7  and why?", "", "x", "y" * 3000, "z " * 50])
    result = collect(max_chars=2000)
    assert result.exit_code == 0, result.output
    train, heldout = rows("train"), rows("heldout")
    assert sorted([*train.values(), *heldout.values()]) == sorted(questions(100))
    assert all(row_id == query_id(text) for row_id, text in (train | heldout).items())
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert manifest.rows == 100
    assert set(manifest.files) == {"train.parquet", "heldout.parquet"}
    assert manifest.models["backbone"]["sha256"]
    assert manifest.counts["all"] == {
        "read": 105, "empty": 1, "too_short": 1, "too_long": 1, "too_many_tokens": 1, "duplicate": 1, "sampled_out": 0,
        "train": len(train), "heldout": len(heldout),
    }  # fmt: skip
    assert json.loads(Path("results/collect.json").read_text())["counts"] == manifest.counts


def test_a_second_run_gives_equal_bytes(collect: Collect) -> None:
    write(questions(50))
    contents = []
    for _ in range(2):
        assert collect(sample=30).exit_code == 0
        contents.append({path.name: path.read_bytes() for path in QUERIES_DIR.iterdir()})
    assert contents[0] == contents[1]


def test_a_grown_corpus_leaves_every_query_in_its_split(collect: Collect) -> None:
    write(questions(60))
    assert collect().exit_code == 0
    before = {split: rows(split) for split in ("train", "heldout")}
    write([*reversed(questions(90)), "another one"])
    assert collect().exit_code == 0
    assert all(before[split].items() <= rows(split).items() for split in before)


def test_of_two_sources_with_the_same_text_the_first_counts(collect: Collect) -> None:
    write(questions(30))
    write(questions(40), "more.jsonl")
    assert collect(sources=[LOCAL, LOCAL | {"path": "more.jsonl", "limit": 35}]).exit_code == 0
    counts = open_artifact(QUERIES_DIR, "queries").manifest.counts
    assert (counts["queries.jsonl"]["duplicate"], counts["more.jsonl"]["duplicate"]) == (0, 30)
    assert counts["more.jsonl"]["read"] == 35
    sources = [
        pq.read_table(QUERIES_DIR / f"{split}.parquet").column("source").to_pylist() for split in ("train", "heldout")
    ]
    assert sorted({*sources[0], *sources[1]}) == ["more.jsonl", "queries.jsonl"]


def test_without_a_token_limit_no_tokenizer_is_loaded(collect: Collect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.collect.load_tokenizer", None)
    write(questions(30))
    assert collect(max_tokens=None).exit_code == 0
    assert open_artifact(QUERIES_DIR, "queries").manifest.models == {}


def test_texts_that_break_naive_code_come_through(collect: Collect) -> None:
    odd = {
        "👩‍🚀🌍": "👩‍🚀🌍",
        "ما هي عاصمة فرنسا؟": "ما هي عاصمة فرنسا؟",
        "nul\x00 inside": "nul inside",
        "lone \ud800 half": "lone half",
        "e\u0301 composed": "é composed",
    }
    write([*odd, *questions(30), "\ud800", "\x00", "a", "b" * 100_000])
    assert collect().exit_code == 0
    kept = {*rows("train").values(), *rows("heldout").values()}
    assert kept == {*odd.values(), *questions(30)}
    counts = open_artifact(QUERIES_DIR, "queries").manifest.counts["all"]
    assert (counts["empty"], counts["too_short"], counts["too_long"]) == (2, 1, 1)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_a_corpus_without_rows(collect: Collect) -> None:
    write([])
    assert failure(collect()) == "the corpus is empty: collect.sources hold no rows at all"


def test_a_corpus_without_a_usable_row_says_why(collect: Collect) -> None:
    write(["", "x", "y" * 100_000, "w " * 100])
    message = failure(collect())
    assert message == (
        "none of the 4 rows of collect.sources is usable: empty 1, too_short 1, too_long 1, too_many_tokens 1 "
        "(limits: collect.min_chars 2, collect.max_chars 8000, collect.max_tokens 64)"
    )


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "heldout"), (1 - 1e-9, "train")])
def test_an_empty_split_names_its_fraction(collect: Collect, fraction: float, empty: str) -> None:
    write(questions(5))
    message = failure(collect(heldout_fraction=fraction))
    assert message == (
        f"collect.heldout_fraction {fraction} of 5 queries leaves the {empty} split empty: change it or add queries"
    )


def test_a_missing_file(collect: Collect) -> None:
    assert failure(collect()).startswith("in/queries.jsonl does not exist")


def test_a_missing_column(collect: Collect) -> None:
    write(questions(3))
    message = failure(collect(sources=[LOCAL | {"column": "prompt"}]))
    assert message == "in/queries.jsonl, line 1: no column 'prompt' (columns there: text)"


def test_a_truncated_parquet_file(collect: Collect) -> None:
    Path("in").mkdir()
    Path("in/q.parquet").write_bytes(b"PAR1 cut off")
    assert failure(collect(sources=[LOCAL | {"path": "q.parquet"}])).startswith("in/q.parquet is damaged")


def test_mistyped_and_unknown_keys_are_reported_together(collect: Collect) -> None:
    result = collect(max_chars="many", min_char=1, heldout_fraction=1.5)
    assert result.exit_code == 1
    for problem in (
        "collect.max_chars: ",
        "collect.min_char: unknown key (did you mean 'min_chars'?)",
        "collect.heldout_fraction: ",
    ):
        assert f"params.yaml: {problem}" in result.stderr


def test_a_backbone_that_is_not_there(collect: Collect) -> None:
    write(questions(3))
    assert failure(collect("./no/such/model")).startswith("backbone.name: cannot load './no/such/model'")


def test_a_failed_run_keeps_the_former_queries(collect: Collect) -> None:
    write(questions(40))
    assert collect().exit_code == 0
    before = {path.name: path.read_bytes() for path in QUERIES_DIR.iterdir()}
    write([])
    assert collect().exit_code == 1
    assert {path.name: path.read_bytes() for path in QUERIES_DIR.iterdir()} == before


def test_a_full_disk(collect: Collect, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_disk)
    noise = [random.Random(seed).randbytes(3000).hex() for seed in range(900)]
    corpus = small_disk.parent / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in noise))
    message = failure(collect(sources=[LOCAL | {"path": str(corpus)}], max_tokens=None))
    assert message.startswith("cannot write data/queries: No space left on device")
    assert list(Path("data").iterdir()) == []


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_prompts_of_three_sources(collect: Collect, real_data: Path) -> None:
    files = {"queries_alpaca": 16388, "dolly_3k": 2981, "gsm8k_train": 7473}
    sources = [LOCAL | {"path": f"{name}.parquet"} for name in files]
    result = collect(local_dir=str(real_data / "queries"), sources=sources, sample=5000, max_tokens=256)
    assert result.exit_code == 0, result.output
    counts = open_artifact(QUERIES_DIR, "queries").manifest.counts
    assert {name: counts[f"{name}.parquet"]["read"] for name in files} == files
    assert counts["all"]["train"] + counts["all"]["heldout"] == 5000
    assert abs(counts["all"]["heldout"] - 1000) < 120
    assert all(counts[f"{name}.parquet"]["train"] > 100 for name in files)


@pytest.mark.realdata
@pytest.mark.models
def test_real_prompts_measured_by_a_real_tokenizer(collect: Collect, real_data: Path, small_lm: Path) -> None:
    from transformers import AutoTokenizer

    source = LOCAL | {"path": "gsm8k_train.parquet"}
    assert collect(small_lm, local_dir=str(real_data / "queries"), sources=[source], max_tokens=64).exit_code == 0
    counts = open_artifact(QUERIES_DIR, "queries").manifest.counts["all"]
    assert 500 < counts["too_many_tokens"] < 3000
    kept = [*rows("train").values(), *rows("heldout").values()]
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(small_lm)(kept, add_special_tokens=False)["input_ids"]]
    assert max(lengths) == 64
