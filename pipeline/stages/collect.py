"""collect: sources -> data/queries/{train,heldout}.parquet

python -m pipeline.stages.collect [--params params.yaml]
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import polars as pl
import typer

from pipeline import artifacts, contracts, queries
from pipeline.backbone import BackboneParams, identify, load_tokenizer
from pipeline.errors import SourceError
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.queries import FATES, SPLITS, CollectParams, TokenCounter
from pipeline.runtime import RunRecord, progress, record, setup_logging, user_errors
from pipeline.sources import read_texts

log = logging.getLogger(__name__)

QUERIES_DIR = Path("data/queries")
TOKENIZE_BATCH = 1000


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    collect: CollectParams


def token_counter(backbone: BackboneParams) -> TokenCounter:
    """A function that counts the backbone's tokens of texts, without special tokens.

    Raises:
        BackboneError: its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(backbone)

    def count(texts: Sequence[str]) -> list[int]:
        starts = range(0, len(texts), TOKENIZE_BATCH)
        lengths: list[int] = []
        for start in progress(starts, total=len(starts), desc="count tokens", unit="batch"):
            batch = list(texts[start : start + TOKENIZE_BATCH])
            lengths += [len(ids) for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]]
        return lengths

    return count


def select(inputs: Inputs) -> pl.DataFrame:
    """Every row of every source with what became of it (columns `source`, `text`, `id`, `fate`).

    Raises:
        SourceError: a source cannot be read.
        BackboneError: the tokenizer that measures the texts cannot be loaded.
    """
    params, folder = inputs.collect, Path(inputs.collect.local_dir)
    texts = ((source.label, text) for source in params.sources for text in read_texts(source, folder))
    frame = queries.to_frame(progress(texts, total=None, desc="read"))
    frame = queries.drop_lengths(frame, min_chars=params.min_chars, max_chars=params.max_chars)
    if params.max_tokens is not None:
        counter = token_counter(inputs.backbone)
        frame = queries.drop_token_lengths(frame, max_tokens=params.max_tokens, count_tokens=counter)
    if params.sample is not None:
        frame = queries.sample(frame, rows=params.sample, seed=params.seed)
    return queries.split(frame, heldout_fraction=params.heldout_fraction, seed=params.seed)


def check_counts(counts: dict[str, int], params: CollectParams) -> None:
    """Raises SourceError, with what became of the rows, if nothing was read or left or one split is empty."""
    if not counts["read"]:
        raise SourceError("the corpus is empty: collect.sources hold no rows at all")
    left = sum(counts[split] for split in SPLITS)
    if not left:
        reasons = ", ".join(f"{fate} {counts[fate]}" for fate in FATES if counts[fate])
        raise SourceError(
            f"none of the {counts['read']} rows of collect.sources is usable: {reasons} (limits: collect.min_chars "
            f"{params.min_chars}, collect.max_chars {params.max_chars}, collect.max_tokens {params.max_tokens})"
        )
    for split in SPLITS:
        if not counts[split]:
            raise SourceError(
                f"collect.heldout_fraction {params.heldout_fraction} of {left} queries leaves the {split} split empty: "
                "change it or add queries"
            )


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Read, select and write the queries.

    Raises:
        SourceError: a source cannot be read, or one split is left empty.
        BackboneError: the tokenizer that measures the texts cannot be loaded.
        WorkError: the disk is full.
    """
    frame = select(inputs)
    counts = queries.count_fates(frame)
    log.info("queries: %s", ", ".join(f"{name} {rows}" for name, rows in counts["all"].items() if rows))
    check_counts(counts["all"], inputs.collect)
    measured = inputs.collect.max_tokens is not None
    models = {"backbone": identify(inputs.backbone.name, inputs.backbone.revision)} if measured else {}
    with artifacts.create(QUERIES_DIR, kind="queries", params=inputs.collect.model_dump(), models=models) as out:
        out.counts = counts
        for split in SPLITS:
            table = queries.split_table(frame, split)
            contracts.check_table(table, contracts.QUERIES, f"{QUERIES_DIR}/{split}.parquet")
            out.write_table(f"{split}.parquet", table)
    facts.update(counts=counts)


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Collect the queries of all sources."""
    setup_logging()
    with user_errors(), record("collect") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
