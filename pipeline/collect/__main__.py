"""collect: sources -> data/queries/{train,heldout}.parquet, removed.jsonl

python -m pipeline.collect [--params params.yaml]
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import Field

from pipeline.backbone.loading import BackboneParams, identify, load_tokenizer
from pipeline.collect import languages, near_duplicates
from pipeline.collect.corpus import Check, Corpus
from pipeline.collect.params import CollectParams
from pipeline.collect.rows import FATES, SPLITS
from pipeline.collect.spill import Mask, scratch_folder
from pipeline.core import artifacts
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import EvaluationError, ParamsError, SourceError
from pipeline.core.paths import QUERIES_DIR
from pipeline.core.run import RunRecord, progress, record, setup_logging, user_errors, work_dir
from pipeline.tasks.suites import SuiteParams
from pipeline.tasks.texts import TextSource, find_texts

log = logging.getLogger(__name__)


class EvaluateFolder(Params, extra="ignore"):
    """Where the local evaluation data is; the rest of that section is none of this stage's business."""

    local_dir: str


class Inputs(Params):
    """The sections of params.yaml that this stage reads; the last three only for collect.decontaminate."""

    backbone: BackboneParams
    collect: CollectParams
    evaluate: EvaluateFolder | None = None
    # Without a suite or a probe the report, hours later, would miss their folders.
    suites: dict[str, SuiteParams] = Field(default_factory=dict, min_length=1)
    probes: dict[str, dict[str, Any]] = Field(default_factory=dict, min_length=1)


class Phases:
    """Seconds of each part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def evaluation_texts(inputs: Inputs) -> list[TextSource]:
    """What collect.decontaminate holds the queries against; nothing where it is off.

    Raises:
        ParamsError: it is on, and params name no evaluation.
        SourceError: a task or folder does not exist.
    """
    if inputs.collect.decontaminate is None:
        return []
    if inputs.evaluate is None:
        raise ParamsError("evaluate.local_dir: missing, collect.decontaminate needs it")
    with _readable_evaluation():
        found = find_texts(inputs.suites, inputs.probes, Path(inputs.evaluate.local_dir))
    if not found:
        raise ParamsError("collect.decontaminate: suites and probes name no data to hold the queries against")
    return found


@contextlib.contextmanager
def _readable_evaluation() -> Iterator[None]:
    try:
        yield
    except EvaluationError as error:
        raise SourceError(
            f"collect.decontaminate: cannot read the evaluation's texts: {error} (a hub that answers or a filled "
            "datasets cache is needed; collect.decontaminate: null does without)"
        ) from None


def checks(inputs: Inputs) -> dict[str, Check]:
    """What each text must pass, by the fate of those that do not.

    Raises:
        BackboneError: the tokenizer cannot be loaded.
        ParamsError: collect.languages names an unknown language.
    """
    found: dict[str, Check] = {}
    if inputs.collect.max_tokens is not None:
        found["too_many_tokens"] = more_tokens_than(inputs.collect.max_tokens, inputs.backbone)
    if inputs.collect.languages is not None:
        wanted = languages.LanguageFilter(inputs.collect.languages, inputs.collect.language_confidence)
        found["other_language"] = wanted.others
    return found


def more_tokens_than(limit: int, backbone: BackboneParams) -> Check:
    """Which texts have more than `limit` of the backbone's tokens, without special tokens.

    Raises:
        BackboneError: its tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(backbone)

    def check(texts: Sequence[str]) -> Mask:
        over = np.zeros(len(texts), dtype=bool)
        # No tokenizer makes two tokens of an ASCII character; one token may stand for the start of the text.
        unsure = [index for index, text in enumerate(texts) if len(text) >= limit or not text.isascii()]
        if unsure:
            batch = [texts[index] for index in unsure]
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            over[unsure] = [len(ids) > limit for ids in encoded]
        return over

    return check


def made_with(inputs: Inputs, evaluation: Sequence[TextSource]) -> dict[str, Any]:
    """Identities of what decides besides params, by role."""
    params, models = inputs.collect, dict[str, Any]()
    if params.max_tokens is not None:
        models["backbone"] = identify(inputs.backbone.name, inputs.backbone.revision)
    if params.languages is not None:
        models["languages"] = languages.library()
    if params.near_duplicates is not None:
        models["near_duplicates"] = near_duplicates.library()
    if evaluation:
        models["evaluation"] = {source.name: source.revision for source in evaluation}
    return models


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


def select(inputs: Inputs, corpus: Corpus, evaluation: Sequence[TextSource], phases: Phases) -> None:
    """Decide what becomes of every row of every source.

    Raises:
        SourceError: a source or evaluation text cannot be read.
        BackboneError: the tokenizer that measures the texts cannot be loaded.
        ParamsError: collect.languages names an unknown language.
        WorkError: the disk is full.
    """
    params, tests = inputs.collect, checks(inputs)
    with phases("read"):
        corpus.read(Path(params.local_dir), min_chars=params.min_chars, max_chars=params.max_chars)
    with phases("measure"):
        corpus.measure(tests)
    if params.decontaminate is not None:
        with phases("decontaminate"), _readable_evaluation():
            texts = ((source.name, batch) for source in evaluation for batch in source.batches())
            batches = progress(texts, total=None, desc="evaluation texts", unit="batch")
            count = corpus.decontaminate(batches, ngram=params.decontaminate.ngram)
        log.info("held against %d texts of %d evaluation data sets", count, len(evaluation))
    if params.near_duplicates is not None:
        with phases("near_duplicates"):
            corpus.drop_near_duplicates(params.near_duplicates)
    if params.sample is not None:
        corpus.sample(params.sample, seed=params.seed, weights=params.weights)
    corpus.split(heldout_fraction=params.heldout_fraction, seed=params.seed)


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Read, select and write the queries.

    Raises:
        SourceError: a source or evaluation text cannot be read, or one split is left empty.
        BackboneError: the tokenizer that measures the texts cannot be loaded.
        ParamsError: params contradict each other.
        WorkError: the disk is full, or another process collects in this work directory.
    """
    params, phases = inputs.collect, Phases()
    evaluation = evaluation_texts(inputs)
    compared = params.decontaminate is not None or params.near_duplicates is not None
    with (
        scratch_folder(work_dir("collect")) as scratch,
        contextlib.closing(Corpus(scratch, params.sources, compared=compared)) as corpus,
    ):
        select(inputs, corpus, evaluation, phases)
        counts = corpus.counts()
        log.info("queries: %s", ", ".join(f"{name} {rows}" for name, rows in counts["all"].items() if rows))
        check_counts(counts["all"], params)
        models = made_with(inputs, evaluation)
        with (
            phases("write"),
            artifacts.create(QUERIES_DIR, kind="queries", params=params.model_dump(), models=models) as out,
        ):
            corpus.write(out)
    rate = round(counts["all"]["read"] / max(sum(phases.seconds.values()), 0.01), 1)
    facts.update(counts=counts, phase_seconds=phases.seconds, rows_per_s=rate)


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Collect the queries of all sources."""
    setup_logging()
    with user_errors("collect keeps nothing, run it again from the start"), record("collect") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
