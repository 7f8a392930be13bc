"""Tasks of the study as local folders: parts that are cheap to repeat, and two whole ones for the last rows.

| suite | tasks |
|---|---|
| parts | 200 pairs each of STSBenchmark and STS13; 12 classes of Banking77, 12 + 12 texts each; 40 claims of SciFact |
| reasoning | 60 questions of ARC-Challenge; the choices of all of them are the corpus |
| safety | 40 requests of AdvBench-IR among their passages and others: the lower score is the better one |
| whole | both test splits of pairs; all of Banking77's test texts, 16 training texts a class; all claims of SciFact |
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.common import REAL_DATA

PAIRS = 200
CLAIMS, OTHERS = 40, 40  # queries of a retrieval part, and documents of no such query
QUESTIONS = 60
HUB = REAL_DATA / "hub" / "mteb"
PARTS = ("STSB-part", "STS13-part", "Banking77-part", "SciFact-part")
WHOLE = ("STSB", "STS13", "Banking77", "SciFact")
REASONING, SAFETY = "ARC-part", "AdvBench-part"
SUITES = {"parts": PARTS, "short": (PARTS[0], *PARTS[2:]), "reasoning": (REASONING,), "safety": (SAFETY,)}
SEED = 0
Tables = Mapping[str, Mapping[str, pa.Table]]  # config -> split -> table


def write_tasks(folder: Path, others: int) -> dict[str, list[str]]:
    """The tasks, unless they are there, and the suites they make; `others`: unjudged documents in the whole SciFact."""
    scifact = f"{WHOLE[-1]}-{others}"
    contents: dict[str, Callable[[], Tables]] = {
        PARTS[0]: lambda: pairs("stsbenchmark-sts", PAIRS),
        PARTS[1]: lambda: pairs("sts13-sts", PAIRS),
        PARTS[2]: lambda: classes(12, {"train": 12, "test": 12}),
        PARTS[3]: lambda: searched(HUB / "scifact", CLAIMS, OTHERS),
        REASONING: questions,
        SAFETY: lambda: searched(REAL_DATA / "hub" / "McGill-NLP" / "AdvBench-IR-chunked", CLAIMS, OTHERS),
        WHOLE[0]: lambda: pairs("stsbenchmark-sts", None),
        WHOLE[1]: lambda: pairs("sts13-sts", None),
        WHOLE[2]: lambda: classes(77, {"train": 16, "test": None}),
        scifact: lambda: searched(HUB / "scifact", None, others),
    }
    for name, part in contents.items():
        if not (folder / name / "README.md").is_file():
            write_task(folder / name, part())
    return {**{name: list(tasks) for name, tasks in SUITES.items()}, "whole": [*WHOLE[:-1], scifact]}


def write_task(folder: Path, tables: Tables) -> None:
    """A local task."""
    lines = ["---", "configs:"]
    for config, splits in tables.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, table in splits.items():
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def sample(table: pa.Table, count: int | None) -> pa.Table:
    """A random draw of rows, in their order; None: all."""
    return table.take(np.sort(np.random.default_rng(SEED).permutation(table.num_rows)[:count]))


def pairs(name: str, count: int | None) -> Tables:
    """A draw of the pairs of an STS task's test split; None: all."""
    table = pq.read_table(HUB / name / "data" / "test.parquet").select(["sentence1", "sentence2", "score"])
    return {"default": {"test": sample(table, count)}}


def classes(count: int, texts: Mapping[str, int | None]) -> Tables:
    """The first classes of Banking77, a draw of the texts of each by split; None: all."""
    splits = {}
    for split, each in texts.items():
        table = pq.read_table(HUB / "banking77" / "data" / f"{split}.parquet").select(["text", "label"])
        splits[split] = pa.concat_tables([sample(table.filter(pc.field("label") == c), each) for c in range(count)])
    return {"default": splits}


def searched(folder: Path, claims: int | None, others: int) -> Tables:
    """A draw of a retrieval task's queries, their documents and a draw of others."""
    files = ("default/test.parquet", "queries/queries.parquet", "corpus/corpus.parquet")
    judgements, queries, corpus = (pq.read_table(folder / name) for name in files)
    queries = sample(queries.filter(pc.is_in(queries["_id"], judgements["query-id"].combine_chunks())), claims)
    judgements = judgements.filter(pc.is_in(judgements["query-id"], queries["_id"].combine_chunks()))
    own = pc.is_in(corpus["_id"], judgements["corpus-id"].combine_chunks())
    passages = pa.concat_tables([corpus.filter(own), sample(corpus.filter(pc.invert(own)), others)])
    return {"corpus": {"corpus": passages}, "queries": {"queries": queries}, "default": {"test": judgements}}


def questions() -> Tables:
    """A draw of ARC's questions with their choices."""
    table = pq.read_table(REAL_DATA / "reasoning" / "rarb_mcr_ARC-Challenge-test.parquet")
    return {"default": {"test": sample(table.select(["queries", "documents", "labels"]), QUESTIONS)}}
