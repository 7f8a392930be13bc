"""Per-unit scores of an mteb task, observed while it runs.

Retrieval passes the scores of each query to `task_specific_scores`; the other types write predictions. Unit scores that
do not reproduce mteb's own main score are not used: the task then gets no interval, and a log line says so.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.files import digest_of
from pipeline.evaluate.unit_scores import Kind, UnitScores

log = logging.getLogger(__name__)

_TOLERANCE = 2e-5  # mteb rounds the scores of retrieval to five digits
_TREC = {
    "ndcg_at": "ndcg_cut",
    "map_at": "map_cut",
    "recall_at": "recall",
    "precision_at": "P",
    "hit_rate_at": "success",
}
_SIMILARITIES = {
    "cosine_spearman": "cosine_scores",
    "spearman": "similarity_scores",
    "manhattan_spearman": "manhattan_distances",
    "euclidean_spearman": "euclidean_distances",
}
_BEST_SUBQUERY = "max_over_subqueries_"

Subset = tuple[str, str]
"""Names of a split and of a subset of it."""


class Observer:
    """Observes one run of one mteb task (no aggregate) whose data is loaded."""

    def __init__(self, task: Any, folder: Path) -> None:
        """`folder` receives mteb's prediction files; it must exist until `unit_scores` returns."""
        from mteb.abstasks import AbsTaskRetrieval

        self._task, self._folder = task, folder
        self._queries: dict[Subset, dict[str, float]] = {}
        self.prediction_folder: Path | None = folder
        if isinstance(task, AbsTaskRetrieval):
            self.prediction_folder = None  # a thousand passages a query, of which only the scores are used
            self._observe_queries()

    def unit_scores(self, result: Any) -> list[UnitScores]:
        """One entry for each split and subset of mteb's TaskResult; empty if one of them cannot be had."""
        name, main = self._task.metadata.name, self._task.metadata.main_score
        subsets = [(scores, (split, scores["hf_subset"])) for split, found in result.scores.items() for scores in found]
        parts = [self._reproducing(scores, subset) for scores, subset in subsets]
        found = [part for part in parts if part is not None]
        if len(found) == len(parts):
            return found
        log.info("%s: no interval (no scores of single texts reproduce its %s)", name, main)
        return []

    def _reproducing(self, scores: Mapping[str, Any], subset: Subset) -> UnitScores | None:
        for candidate in self._candidates(scores, subset):
            if candidate.units and math.isclose(candidate.score(), scores["main_score"], abs_tol=_TOLERANCE):
                return candidate
        return None

    def _candidates(self, scores: Mapping[str, Any], subset: Subset) -> Iterator[UnitScores]:
        main = self._task.metadata.main_score
        if subset in self._queries:
            names, values = zip(*sorted(self._queries[subset].items()), strict=True)
            yield _means(subset, "query", names, values)
        predictions, read = self._predictions(subset), _READERS.get(self._task.metadata.type)
        if predictions is not None and read is not None:
            yield from read(self._task, main, predictions, subset)
        runs = _runs(main, scores)
        yield _means(subset, "run", range(len(runs)), runs)

    def _predictions(self, subset: Subset) -> Any:
        """mteb's predictions; parallel texts are filed under one name for all languages."""
        path = self._folder / self._task.prediction_file_name
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return content.get(subset[1], content.get("parallel", {})).get(subset[0])

    def _observe_queries(self) -> None:
        original, main = self._task.task_specific_scores, self._task.metadata.main_score

        def observed(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
            if values := _query_scores(main, scores, qrels, results):
                self._queries[hf_split, hf_subset] = values
            return original(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

        self._task.task_specific_scores = observed


def _query_scores(main: str, scores: Any, qrels: Any, results: Any) -> dict[str, float] | None:
    """The main score of each query, None for one that is not a mean over queries."""
    if main.startswith(_BEST_SUBQUERY):
        return _best_subquery(main.removeprefix(_BEST_SUBQUERY), qrels, results)
    if main == "accuracy":
        main = "recall_at_1"
    name, _, depth = main.rpartition("_")
    if name == "mrr_at":
        return {query: _reciprocal_rank(qrels[query], found, int(depth)) for query, found in results.items()}
    if name not in _TREC:
        return None
    return {query: values[f"{_TREC[name]}_{depth}"] for query, values in scores.items()}


def _reciprocal_rank(relevant: Mapping[str, int], found: Mapping[str, float], depth: int) -> float:
    best = sorted(found.items(), key=lambda item: (item[1], item[0]), reverse=True)[:depth]
    return next((1 / rank for rank, (name, _) in enumerate(best, 1) if relevant.get(name, 0) > 0), 0.0)


def _best_subquery(main: str, qrels: Any, results: Any) -> dict[str, float] | None:
    """Queries `<base>_<n>` are one: each passage counts with its best score among them."""
    import pytrec_eval

    name, _, depth = main.rpartition("_")
    if name not in _TREC:
        return None
    merged: dict[str, dict[str, float]] = {}
    for query in qrels:
        passages = merged.setdefault(query.rpartition("_")[0], {})
        for passage, score in results[query].items():
            passages[passage] = max(score, passages.get(passage, -math.inf))
    judged = {query.rpartition("_")[0]: relevant for query, relevant in qrels.items()}
    scores = pytrec_eval.RelevanceEvaluator(judged, {f"{_TREC[name]}.{depth}"}).evaluate(merged)
    return {query: values[f"{_TREC[name]}_{depth}"] for query, values in scores.items()}


def _sts(task: Any, main: str, predictions: Any, subset: Subset) -> Iterator[UnitScores]:
    measure = _SIMILARITIES.get(main)
    if measure is not None and predictions.get(measure) is not None:
        gold = np.array(_data(task, subset)["score"], dtype=np.float64)
        yield _paired(subset, "pair", "spearman", gold, np.array(predictions[measure]))


def _pairs(task: Any, main: str, predictions: Any, subset: Subset) -> Iterator[UnitScores]:
    if main != "max_ap":
        return
    data = _data(task, subset)
    rows = data[0] if len(data) == 1 else data  # older data sets hold all pairs in one row
    gold = np.array(rows[task.label_column_name], dtype=np.int8)
    far = {"manhattan_distances", "euclidean_distances"}
    similar = [[-value for value in values] if name in far else values for name, values in predictions.items()]
    yield _paired(subset, "pair", "ap", gold, np.array(similar))


def _classes(task: Any, main: str, predictions: Any, subset: Subset) -> Iterator[UnitScores]:
    labels = np.array(_data(task, subset)[task.label_column_name])
    runs = [np.array(run) for run in predictions]
    if any(run.shape != labels.shape for run in runs):
        return  # cross-validation: each run has texts of its own
    if main == "accuracy":
        yield _means(subset, "text", labels.tolist(), np.mean([run == labels for run in runs], axis=0))
    if main == "f1":
        _, codes = np.unique(np.stack([labels, *runs]), return_inverse=True)
        codes = codes.reshape(len(runs) + 1, len(labels)).astype(np.int32)
        yield _paired(subset, "text", "f1", codes[0], codes[1:])


def _summaries(task: Any, main: str, predictions: Any, subset: Subset) -> Iterator[UnitScores]:
    from scipy.stats import spearmanr

    measure = _SIMILARITIES.get(main)
    if measure in predictions:
        gold, found = predictions["human_scores"], predictions[measure]
        values = [float(spearmanr(a, b).statistic) for a, b in zip(gold, found, strict=True)]
        yield _means(subset, "text", gold, values)


def _translations(task: Any, main: str, predictions: Any, subset: Subset) -> Iterator[UnitScores]:
    """Weighted F1 of a sentence, where sentence i belongs to sentence i: 2 / (1 + times i was predicted) if found."""
    if main != "f1":
        return
    pairs = predictions.get(subset[1]) or next(iter(predictions.values()))
    predicted = np.array([int(pair["corpus_id"]) for pair in pairs])
    count = len(predicted)
    times = np.bincount(predicted, minlength=count)[:count]
    yield _means(subset, "pair", [count], np.where(predicted == np.arange(count), 2 / (1 + times), 0.0))


_READERS: dict[str, Callable[[Any, str, Any, Subset], Iterator[UnitScores]]] = {
    "STS": _sts,
    "PairClassification": _pairs,
    "Classification": _classes,
    "Summarization": _summaries,
    "BitextMining": _translations,
}


def _runs(main: str, scores: Mapping[str, Any]) -> list[float]:
    """The score of each repeated run of a clustering or a classifier."""
    if "scores_per_experiment" in scores:
        return [float(run[main]) for run in scores["scores_per_experiment"] if run.get(main) is not None]
    levels = scores.get("v_measures" if main == "v_measure" else f"{main}_scores", [])
    values = levels.values() if isinstance(levels, Mapping) else [levels]
    return [float(score) for level in values for score in level]


def _data(task: Any, subset: Subset) -> Any:
    split, name = subset
    content = task.dataset
    return content[name][split] if name in content else content[split]


def _means(subset: Subset, unit: str, names: Sequence[Any], values: Any) -> UnitScores:
    scores = np.array(values, dtype=np.float64)
    return UnitScores(*subset, unit, digest_of(list(names)), "mean", np.zeros(0), scores)


def _paired(subset: Subset, unit: str, kind: Kind, gold: Any, predicted: Any) -> UnitScores:
    return UnitScores(*subset, unit, digest_of(gold.tolist()), kind, gold, predicted)
