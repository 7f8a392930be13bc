"""Section `collect` applied to a corpus: its checks, the steps that are on, and what decides the result."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.backbone.loading import BackboneParams, identify, load_tokenizer
from pipeline.collect import languages, near_duplicates
from pipeline.collect.corpus import Check, Corpus
from pipeline.collect.params import CollectParams
from pipeline.collect.rows import FATES, SPLITS
from pipeline.collect.token_limit import TokenLimit
from pipeline.core.errors import EvaluationError, SourceError
from pipeline.core.run import progress
from pipeline.tasks.texts import TextSource

log = logging.getLogger(__name__)


@contextlib.contextmanager
def readable_evaluation() -> Iterator[None]:
    """Raise errors of the evaluation's texts as SourceError about `decontaminate`."""
    try:
        yield
    except EvaluationError as error:
        message = f"cannot read the evaluation's texts: {error} (needs the hub or a filled cache; null skips this)"
        raise SourceError(message, argument="decontaminate") from None


def select(corpus: Corpus, params: CollectParams, backbone: BackboneParams, evaluation: Sequence[TextSource]) -> None:
    """Decide the fate of every row of every source.

    Raises:
        SourceError: a source or evaluation text cannot be read.
        BackboneError, ParamsError: the tokenizer cannot be loaded, or `languages` has an unknown one.
    """
    checks = text_checks(params, backbone)
    corpus.read(Path(params.local_dir), min_chars=params.min_chars, max_chars=params.max_chars)
    corpus.check(checks)
    if params.decontaminate is not None:
        texts = ((source.name, batch) for source in evaluation for batch in source.batches())
        with readable_evaluation():
            batches = progress(texts, total=None, desc="evaluation texts", unit="batch")
            count = corpus.decontaminate(batches, ngram=params.decontaminate.ngram)
        log.info("compared with %d texts of %d evaluation data sets", count, len(evaluation))
    if params.near_duplicates is not None:
        corpus.drop_near_duplicates(params.near_duplicates)
    if params.sample is not None:
        corpus.sample(params.sample, seed=params.seed, weights=params.weights)
    corpus.split(heldout_fraction=params.heldout_fraction, seed=params.seed)


def text_checks(params: CollectParams, backbone: BackboneParams) -> dict[str, Check]:
    """The checks of each text, by the fate of texts that fail."""
    checks: dict[str, Check] = {}
    if params.max_tokens is not None:
        checks["too_many_tokens"] = TokenLimit(params.max_tokens, load_tokenizer(backbone))
    if params.languages is not None:
        checks["other_language"] = languages.LanguageFilter(params.languages, params.language_confidence).unwanted
    return checks


def identities(params: CollectParams, backbone: BackboneParams, evaluation: Sequence[TextSource]) -> dict[str, Any]:
    """What decides the result besides params, by role."""
    models = dict[str, Any]()
    if params.max_tokens is not None:
        models["backbone"] = identify(backbone.name, backbone.revision)
    if params.languages is not None:
        models["languages"] = languages.library()
    if params.near_duplicates is not None:
        models["near_duplicates"] = near_duplicates.library()
    if evaluation:
        models["evaluation"] = {source.name: source.revision for source in evaluation}
    return models


def check_counts(counts: Mapping[str, int], params: CollectParams) -> None:
    """Raises SourceError, with the fates of the rows, if there are no rows or a split is empty."""
    if not counts["read"]:
        raise SourceError("no source has a row", argument="sources")
    left = sum(counts[split] for split in SPLITS)
    if not left:
        reasons = ", ".join(f"{fate} {counts[fate]}" for fate in FATES if counts[fate])
        limits = f"min_chars {params.min_chars}, max_chars {params.max_chars}, max_tokens {params.max_tokens}"
        raise SourceError(f"none of {counts['read']} rows is usable: {reasons} (limits: {limits})", argument="sources")
    for split in SPLITS:
        if not counts[split]:
            message = f"{params.heldout_fraction} of {left} queries leaves the {split} split empty: add queries"
            raise SourceError(message, argument="heldout_fraction")
