"""Findings for each query, pair or text of an mteb task, taken while it runs.

Retrieval hands its scores of each query to `task_specific_scores`; the other types write predictions. What does not
reproduce mteb's own main score is not used: a difference then gets no interval, and a log line says so.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.artifacts import digest_of
from pipeline.evaluate.unit_scores import Findings, Kind

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

Where = tuple[str, str]


class Observer:
    """Watches one run of one mteb task (no aggregate), whose data is loaded."""

    def __init__(self, task: Any, folder: Path) -> None:
        """`folder` takes mteb's prediction files; it may go once `findings` were taken."""
        from mteb.abstasks import AbsTaskRetrieval

        self._task, self._folder = task, folder
        self._queries: dict[Where, dict[str, float]] = {}
        self.prediction_folder: Path | None = folder
        if isinstance(task, AbsTaskRetrieval):
            self.prediction_folder = None  # a thousand passages a query, of which only the scores are needed
            self._watch_queries()

    def findings(self, result: Any) -> list[Findings]:
        """One entry for each split and subset of mteb's TaskResult, or none at all if one of them is not to be had."""
        name, main = self._task.metadata.name, self._task.metadata.main_score
        found = []
        for split, subsets in result.scores.items():
            for scores in subsets:
                part = self._reproducing(scores, (split, scores["hf_subset"]))
                if part is None:
                    log.info("%s: no interval (nothing that is known of single texts gives its %s)", name, main)
                    return []
                found.append(part)
        return found

    def _reproducing(self, scores: Mapping[str, Any], where: Where) -> Findings | None:
        score = scores["main_score"]
        for candidate in self._candidates(scores, where):
            if candidate.units and math.isclose(candidate.score(), score, abs_tol=_TOLERANCE):
                return candidate
        return None

    def _candidates(self, scores: Mapping[str, Any], where: Where) -> Iterator[Findings]:
        main = self._task.metadata.main_score
        if where in self._queries:
            values = self._queries[where]
            yield _means(where, "query", sorted(values), [values[query] for query in sorted(values)])
        predictions = self._predictions(where)
        read = _READERS.get(self._task.metadata.type)
        if predictions is not None and read is not None:
            yield from read(self._task, main, predictions, where)
        runs = _runs(main, scores)
        yield _means(where, "run", list(range(len(runs))), runs)

    def _predictions(self, where: Where) -> Any:
        """mteb's predictions of one split and subset; parallel texts are filed under one name for all languages."""
        path = self._folder / self._task.prediction_file_name
        if not path.is_file():
            return None
        split, subset = where
        content = json.loads(path.read_text(encoding="utf-8"))
        return content.get(subset, content.get("parallel", {})).get(split)

    def _watch_queries(self) -> None:
        original, main = self._task.task_specific_scores, self._task.metadata.main_score

        def watched(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
            values = _query_scores(main, scores, qrels, results)
            if values is not None:
                self._queries[hf_split, hf_subset] = values
            return original(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

        self._task.task_specific_scores = watched


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


def _sts(task: Any, main: str, predictions: Any, where: Where) -> Iterator[Findings]:
    measure = _SIMILARITIES.get(main)
    if measure is not None and predictions.get(measure) is not None:
        gold = np.array(_data(task, where)["score"], dtype=np.float64)
        yield _paired(where, "pair", "spearman", gold, np.array(predictions[measure]))


def _pairs(task: Any, main: str, predictions: Any, where: Where) -> Iterator[Findings]:
    if main != "max_ap":
        return
    data = _data(task, where)
    rows = data[0] if len(data) == 1 else data  # older data sets hold all pairs in one row
    gold = np.array(rows[task.label_column_name], dtype=np.int8)
    far = {"manhattan_distances", "euclidean_distances"}
    found = [[-value for value in values] if name in far else values for name, values in predictions.items()]
    yield _paired(where, "pair", "ap", gold, np.array(found))


def _classes(task: Any, main: str, predictions: Any, where: Where) -> Iterator[Findings]:
    labels = np.array(_data(task, where)[task.label_column_name])
    found = [np.array(run) for run in predictions]
    if any(run.shape != labels.shape for run in found):
        return  # cross-validation: each run has texts of its own
    if main == "accuracy":
        values = np.mean([run == labels for run in found], axis=0)
        yield _means(where, "text", labels.tolist(), values)
    if main == "f1":
        _, codes = np.unique(np.stack([labels, *found]), return_inverse=True)
        codes = codes.reshape(len(found) + 1, len(labels)).astype(np.int32)
        yield _paired(where, "text", "f1", codes[0], codes[1:])


def _summaries(task: Any, main: str, predictions: Any, where: Where) -> Iterator[Findings]:
    from scipy.stats import spearmanr

    measure = _SIMILARITIES.get(main)
    if measure in predictions:
        gold, found = predictions["human_scores"], predictions[measure]
        values = [float(spearmanr(a, b).statistic) for a, b in zip(gold, found, strict=True)]
        yield _means(where, "text", gold, values)


def _translations(task: Any, main: str, predictions: Any, where: Where) -> Iterator[Findings]:
    """A sentence's weighted F1, where sentence i belongs to sentence i: 2 / (1 + times i was said) if it was found."""
    if main != "f1":
        return
    pairs = predictions.get(where[1]) or next(iter(predictions.values()))
    said = np.array([int(found["corpus_id"]) for found in pairs])
    wanted = np.arange(len(said))
    times = np.bincount(said, minlength=len(said))[: len(said)]
    yield _means(where, "pair", [len(said)], np.where(said == wanted, 2 / (1 + times), 0.0))


_READERS: dict[str, Callable[[Any, str, Any, Where], Iterator[Findings]]] = {
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


def _data(task: Any, where: Where) -> Any:
    split, subset = where
    content = task.dataset
    return content[subset][split] if subset in content else content[split]


def _means(where: Where, unit: str, names: Sequence[Any], values: Any) -> Findings:
    found = np.array(values, dtype=np.float64)
    return Findings(*where, unit, digest_of(list(names)), "mean", np.zeros(0), found)


def _paired(where: Where, unit: str, kind: Kind, gold: Any, found: Any) -> Findings:
    return Findings(*where, unit, digest_of(gold.tolist()), kind, gold, found)
