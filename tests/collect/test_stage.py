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

from pipeline.audit.findings import Findings
from pipeline.audit.inspect import _head
from pipeline.audit.tables import check_rows
from pipeline.collect.__main__ import app
from pipeline.collect.token_limit import TokenLimit
from pipeline.core.artifacts import open_artifact, read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.schemas import QUERIES, check_table
from pipeline.core.text import query_id
from tests.conftest import tiny_tokenizer
from tests.evaluate.fakes import retrieval_folder

QUERIES_DIR = Path("data/queries")
LOCAL = {"kind": "local", "path": "queries.jsonl", "column": "text"}

Collect = Callable[..., Result]


@pytest.fixture
def collect(workspace: Path, tiny_backbone: Callable[..., Path]) -> Collect:
    """Write params.yaml with these keys of `collect` and run the stage."""
    default = tiny_backbone("llama")

    def run(backbone: Path | str = default, sections: dict[str, Any] | None = None, **keys: Any) -> Result:
        params = {"local_dir": "in", "sources": [LOCAL], "heldout_fraction": 0.2, "max_tokens": 64} | keys
        with Path("params.yaml").open("w") as file:
            content = {"backbone": {"name": str(backbone), "dtype": "float32"}, "collect": params, **(sections or {})}
            YAML().dump(content, file)
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
        "read": 105, "empty": 1, "too_short": 1, "too_long": 1, "too_many_tokens": 1, "duplicate": 1,
        "other_language": 0, "contaminated": 0, "near_duplicate": 0, "sampled_out": 0,
        "train": len(train), "heldout": len(heldout),
    }  # fmt: skip
    facts = json.loads(Path("results/collect.json").read_text())
    assert facts["counts"] == manifest.counts
    assert facts["rows_per_s"] > 0
    assert facts["phase_seconds"].keys() == {"read", "measure", "write"}
    assert not list(Path(".work/collect").glob("scratch-*"))


def test_every_long_step_says_how_far_it_is(collect: Collect) -> None:
    write(questions(50))
    result = collect(near_duplicates=NEAR)
    train, heldout = len(rows("train")), len(rows("heldout"))
    for done in ("measure: 100%", "near duplicates: 100%", "write train: 100%", "write heldout: 100%"):
        assert done in result.stderr
    assert f" {train}/{train} " in result.stderr
    assert f" {heldout}/{heldout} " in result.stderr


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


def test_sources_of_one_path_are_counted_apart(collect: Collect) -> None:
    write(questions(30))
    assert collect(sources=[LOCAL, LOCAL | {"instruction": "Explain:", "limit": 20}]).exit_code == 0
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert {name: counts["read"] for name, counts in manifest.counts.items()} == {
        "all": 50,
        "queries.jsonl (sources.0)": 30,
        "queries.jsonl (sources.1)": 20,
    }
    table = open_artifact(QUERIES_DIR, "queries").read(columns=["text", "source"])
    assert {
        (text.startswith("Explain:"), source)
        for text, source in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True)
    } == {(False, "queries.jsonl (sources.0)"), (True, "queries.jsonl (sources.1)")}


def test_an_instruction_stands_before_the_texts_of_its_source(collect: Collect) -> None:
    write(questions(30))
    write([*questions(20), "x", " "], "more.jsonl")
    asked = LOCAL | {"path": "more.jsonl", "instruction": " Say  the same as: "}
    assert collect(sources=[LOCAL, asked], near_duplicates=NEAR).exit_code == 0
    found = rows("train") | rows("heldout")
    # A question under the instruction is another query than the question, and no duplicate of it.
    assert sorted(found.values()) == sorted([*questions(30), *(f"Say the same as: {each}" for each in questions(20))])
    assert all(row_id == query_id(text) for row_id, text in found.items())
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert [source.get("instruction") for source in manifest.params["sources"]] == [None, " Say  the same as: "]
    counts = manifest.counts["more.jsonl"]
    assert (counts["empty"], counts["too_short"]) == (1, 1)  # the text counts, not its instruction
    findings = Findings()
    check_rows({"data/queries": open_artifact(QUERIES_DIR, "queries")}, findings)
    assert not findings.items


def test_without_a_token_limit_no_tokenizer_is_loaded(collect: Collect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.collect.selection.load_tokenizer", None)
    write(questions(30))
    assert collect(max_tokens=None).exit_code == 0
    assert open_artifact(QUERIES_DIR, "queries").manifest.models == {}


def test_the_token_limit_holds_at_its_edge() -> None:
    """A token of the tiny tokenizer is a byte."""
    check = TokenLimit(8, tiny_tokenizer())
    texts = ["a" * 7, "a" * 8, "a" * 9, "é" * 4, "é" * 5, ""]
    assert check(texts).tolist() == [False, False, True, False, True, False]


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


# --- removals -------------------------------------------------------------------------------------------------------

PASSAGE = " ".join(f"word{index}" for index in range(60))
NEAR = {"threshold": 0.9, "ngram": 5, "permutations": 128}


def removed() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUERIES_DIR / "removed.jsonl").read_text().splitlines()]


@pytest.fixture
def evaluated(collect: Collect) -> Collect:
    """Collect with an evaluation of one local folder, whose queries are "<word> what is it?"."""
    retrieval_folder(Path("tasks/words"), extra=[f"Before it: {PASSAGE}"])

    def run(**keys: Any) -> Result:
        sections = {"evaluate": {"local_dir": "tasks", "seed": 1}, "suites": {"mine": {"local": ["words"]}}}
        return collect(sections=sections, **{"decontaminate": {"ngram": 13}, "max_tokens": None} | keys)

    return run


def test_near_duplicates_go_and_are_listed(collect: Collect) -> None:
    write([*questions(40), PASSAGE, f"{PASSAGE}!", "What is 12 and why"])
    write([PASSAGE.replace("word7 ", "other ", 1), "WHAT is 3 and why?"], "more.jsonl")
    assert (
        collect(sources=[LOCAL, LOCAL | {"path": "more.jsonl"}], near_duplicates=NEAR, max_tokens=None).exit_code == 0
    )
    found = {row["text"]: row for row in removed()}
    assert found.keys() == {f"{PASSAGE}!", "WHAT is 3 and why?"}  # one word in the middle of 60 changes 5 of 56 n-grams
    assert found[f"{PASSAGE}!"] == {
        "id": query_id(f"{PASSAGE}!"), "source": "queries.jsonl", "text": f"{PASSAGE}!", "reason": "near_duplicate",
        "kept": query_id(PASSAGE), "similarity": round(56 / 57, 4),
    }  # fmt: skip
    assert found["WHAT is 3 and why?"]["kept"] == query_id("what is 3 and why?")
    assert not {row["id"] for row in found.values()} & (rows("train") | rows("heldout")).keys()
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert (manifest.counts["all"]["near_duplicate"], manifest.counts["more.jsonl"]["near_duplicate"]) == (2, 1)
    assert manifest.rows == 43
    assert manifest.models["near_duplicates"]["library"] == "rensa"
    assert "near_duplicates" in json.loads(Path("results/collect.json").read_text())["phase_seconds"]


def test_what_the_evaluation_reads_goes_and_is_listed(evaluated: Collect) -> None:
    write([*questions(40), "Apple: what is IT?", f"Summarize: {PASSAGE}", "apple what is that?"])
    assert evaluated().exit_code == 0
    assert removed() == sorted(
        [
            {
                "id": query_id("Apple: what is IT?"), "source": "queries.jsonl", "text": "Apple: what is IT?",
                "reason": "contaminated", "task": "words", "ngram": "apple what is it",
            },
            {
                "id": query_id(f"Summarize: {PASSAGE}"), "source": "queries.jsonl", "text": f"Summarize: {PASSAGE}",
                "reason": "contaminated", "task": "words", "ngram": " ".join(PASSAGE.split()[:13]),
            },
        ],
        key=lambda row: row["id"],
    )  # fmt: skip
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert manifest.counts["all"]["contaminated"] == 2
    assert manifest.models["evaluation"].keys() == {"words"}
    retrieval_folder(Path("tasks/words"), extra=["changed"])
    assert evaluated().exit_code == 0
    assert open_artifact(QUERIES_DIR, "queries").manifest.models["evaluation"] != manifest.models["evaluation"]


def test_an_instruction_hides_no_text_of_the_evaluation_and_no_near_duplicate(evaluated: Collect) -> None:
    write(questions(40))
    write(["apple: what is it?", "What is a pear?", "what is a pear ?"], "more.jsonl")
    sources = [LOCAL, LOCAL | {"path": "more.jsonl", "instruction": "Explain:"}]
    assert evaluated(sources=sources, near_duplicates=NEAR).exit_code == 0
    assert {row["text"]: row["reason"] for row in removed()} == {
        "Explain: apple: what is it?": "contaminated", "Explain: what is a pear ?": "near_duplicate",
    }  # fmt: skip
    [repeated] = [row for row in removed() if row["reason"] == "near_duplicate"]
    assert (repeated["id"], repeated["kept"]) == (
        query_id("Explain: what is a pear ?"), query_id("Explain: What is a pear?"),
    )  # fmt: skip


def test_a_contaminated_row_does_not_stand_for_its_near_duplicates(evaluated: Collect) -> None:
    write([*questions(40), "Apple what is it?", "apple what is it", f"{PASSAGE} one", f"{PASSAGE} two"])
    assert evaluated(near_duplicates=NEAR).exit_code == 0
    assert {row["reason"] for row in removed()} == {"contaminated"}
    assert len(removed()) == 4


def test_other_languages_go(collect: Collect) -> None:
    french = "Quelle est la capitale de la France et combien d'habitants compte-t-elle ?"
    write([*questions(40), french, "ok"])
    assert collect(languages=["en"], max_tokens=None).exit_code == 0
    manifest = open_artifact(QUERIES_DIR, "queries").manifest
    assert manifest.counts["all"]["other_language"] == 1
    assert "ok" in {*rows("train").values(), *rows("heldout").values()}
    assert manifest.models["languages"]["library"] == "py3langid"


def test_sources_share_the_sample_by_weight(collect: Collect) -> None:
    write(questions(100))
    write([f"how does {index} work?" for index in range(100)], "more.jsonl")
    sources = [LOCAL | {"weight": 3}, LOCAL | {"path": "more.jsonl", "weight": 1.0}]
    assert collect(sources=sources, sample=60).exit_code == 0
    counts = open_artifact(QUERIES_DIR, "queries").manifest.counts
    assert [counts[name]["train"] + counts[name]["heldout"] for name in ("queries.jsonl", "more.jsonl")] == [45, 15]


def test_the_audit_reads_around_the_list_of_removals_and_holds_it_to_its_hash(collect: Collect) -> None:
    write([*questions(40), "WHAT is 3 and why?"])
    assert collect(near_duplicates=NEAR).exit_code == 0
    findings = Findings()
    check_rows({"data/queries": open_artifact(QUERIES_DIR, "queries")}, findings)
    assert not findings.items
    assert [row["file"] for row in _head(read_manifest(QUERIES_DIR), 1)] == ["heldout", "train"]
    path = QUERIES_DIR / "removed.jsonl"
    path.write_text(path.read_text().replace("WHAT", "what"))
    with pytest.raises(ArtifactError, match=r"removed\.jsonl: sha256 is"):
        open_artifact(QUERIES_DIR, "queries")


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_a_corpus_without_rows(collect: Collect) -> None:
    write([])
    assert failure(collect()).startswith("collect.sources: ")


def test_a_corpus_without_a_usable_row_says_why(collect: Collect) -> None:
    write(["", "x", "y" * 100_000, "w " * 100])
    message = failure(collect())
    assert message.startswith("collect.sources: none of 4 rows")
    assert "empty 1, too_short 1, too_long 1, too_many_tokens 1" in message
    assert "min_chars 2, max_chars 8000, max_tokens 64" in message


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "heldout"), (1 - 1e-9, "train")])
def test_an_empty_split_names_its_fraction(collect: Collect, fraction: float, empty: str) -> None:
    write(questions(5))
    message = failure(collect(heldout_fraction=fraction))
    assert message.startswith(f"collect.heldout_fraction: {fraction} of 5 queries")
    assert f"the {empty} split" in message


def test_a_missing_file(collect: Collect) -> None:
    assert failure(collect()).startswith("collect.sources.0.path: in/queries.jsonl does not exist")


def test_a_missing_column(collect: Collect) -> None:
    write(questions(3))
    message = failure(collect(sources=[LOCAL | {"column": "prompt"}]))
    assert message == "collect.sources.0.column: in/queries.jsonl, line 1: no column 'prompt' (columns there: text)"


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
    assert failure(collect("./no/such/model")).startswith("cannot load backbone './no/such/model'")


def test_decontamination_without_an_evaluation(collect: Collect) -> None:
    write(questions(3))
    assert failure(collect(decontaminate={})).startswith("evaluate.local_dir: missing")
    message = failure(collect(decontaminate={}, sections={"evaluate": {"local_dir": "tasks"}}))
    assert message.startswith("collect.decontaminate: suites and probes")


@pytest.mark.parametrize("section", ["suites", "probes"])
def test_an_evaluation_of_nothing_is_refused_before_any_work(collect: Collect, section: str) -> None:
    """The report's dependencies would be missing at the end of the run."""
    write(questions(3))
    message = failure(collect(sections={section: {}}))
    assert message.startswith(f"params.yaml: {section}: ") and "at least 1 item" in message


@pytest.mark.parametrize("suite", [{"local": ["gone"]}, {"tasks": ["STS13"]}])
def test_evaluation_texts_that_cannot_be_read(
    collect: Collect, suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(questions(3))
    sections = {"evaluate": {"local_dir": "tasks"}, "suites": {"mine": suite}}
    message = failure(collect(decontaminate={}, sections=sections))
    assert message.startswith("collect.decontaminate: ")
    assert next(iter(suite.values()))[0] in message


def test_a_failed_run_keeps_the_former_queries(collect: Collect) -> None:
    write(questions(40))
    assert collect().exit_code == 0
    before = {path.name: path.read_bytes() for path in QUERIES_DIR.iterdir()}
    write([])
    assert collect().exit_code == 1
    assert {path.name: path.read_bytes() for path in QUERIES_DIR.iterdir()} == before


@pytest.mark.parametrize(("elsewhere", "where"), [(False, ".work/collect/"), (True, "data/queries")])
def test_a_full_disk(
    collect: Collect, small_disk: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, where: str
) -> None:
    monkeypatch.chdir(small_disk)
    if elsewhere:
        monkeypatch.setenv("PIPELINE_WORK_DIR", str(small_disk.parent / "work"))
    noise = [random.Random(seed).randbytes(3000).hex() for seed in range(900)]
    corpus = small_disk.parent / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in noise))
    message = failure(collect(sources=[LOCAL | {"path": str(corpus)}], max_tokens=None))
    assert message.startswith(f"cannot write {where}")
    assert ": No space left on device. " in message
    assert not list(Path().glob("data/*")) + list(Path().glob(".work/collect/scratch-*"))


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


@pytest.mark.slow
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
