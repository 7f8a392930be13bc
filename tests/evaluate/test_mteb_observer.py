"""Unit scores of real mteb task types, on toy data: each must give mteb's own score again."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.tasks.instructions import load_instructions
from tests.evaluate.fakes import WORDS

TEXTS = [f"{word} number {index}" for index in range(8) for word in WORDS]


class HashSystem:
    """Embeds a text as a random vector of its own, nearer to those with the same first word."""

    prompting = "none"

    def __init__(self, name: str = "student", seed: int = 0) -> None:
        self.name, self.seed = name, seed
        self.identity = {"fake": name, "seed": seed}

    def cache_key(self, text: str, instruction: str, side: str) -> str:
        return text

    def encode(self, texts: Sequence[str], instruction: str, side: str = "query") -> np.ndarray:
        return np.array([self._vector(text.split()[0]) + self._vector(text) for text in texts], dtype=np.float32)

    def _vector(self, text: str) -> np.ndarray:
        return np.random.default_rng([self.seed, zlib.crc32(text.encode())]).normal(size=16)


def task(base: str, kind: str, main: str, content: Any, **attributes: Any) -> Any:
    """An mteb task of class `base` over `content`."""
    import mteb.abstasks
    from mteb import TaskMetadata

    class Toy(getattr(mteb.abstasks, base)):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="Toy",
            description="toy",
            dataset={"path": "toy", "revision": "1"},
            type=kind,
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=main,
        )

        def load_data(self, **_: Any) -> None:
            self.dataset, self.data_loaded = content(), True

    for name, value in attributes.items():
        setattr(Toy, name, value)
    return Toy()


def run(toy: Any, work: Path, *systems: HashSystem) -> list[SystemResults]:
    chosen = systems or (HashSystem(),)
    return run_systems(chosen, [toy], load_instructions(), work=work, dtype="float32")


def rows(**columns: Any) -> Callable[[], DatasetDict]:
    return lambda: DatasetDict({"test": Dataset.from_dict(columns)})


def labelled(labels: Any) -> Callable[[], DatasetDict]:
    data = Dataset.from_dict({"text": TEXTS, "label": labels, "labels": labels, "sentences": TEXTS})
    return lambda: DatasetDict({"train": data, "test": data})


CLASSES = [index % 8 // 2 for index in range(64)]
PAIR = {"sentence1": TEXTS[:40], "sentence2": TEXTS[8:40] + TEXTS[41:49]}
SAME = [int(a.split()[0] == b.split()[0]) for a, b in zip(PAIR["sentence1"], PAIR["sentence2"], strict=True)]
SUMMARIES = {
    "text": TEXTS[:6],
    "human_summaries": [TEXTS[index : index + 2] for index in range(6)],
    "machine_summaries": [TEXTS[index + 8 : index + 14] for index in range(6)],
    "relevance": [[float((rank * rank + index) % 5) for rank in range(6)] for index in range(6)],
}


def retrieval() -> Any:
    queries = [f"{word} what" for word in WORDS]
    names = [f"q{index // 2}_{index % 2}" for index in range(len(queries))]
    relevant = {name: {f"d{index // 2 * 2}": 1, f"d{index // 2 * 2 + 8}": 1} for index, name in enumerate(names)}
    corpus = {"id": [f"d{index}" for index in range(32)], "title": [""] * 32, "text": TEXTS[:32]}
    content = {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict({"id": names, "text": queries}),
        "relevant_docs": relevant,
        "top_ranked": None,
    }
    return {"default": {"test": content}}


def best_of_subqueries(self: Any, scores: Any, qrels: Any, results: Any, **_: Any) -> dict[str, float]:
    from mteb._evaluators.retrieval_metrics import max_over_subqueries

    return max_over_subqueries(qrels, results, self.k_values)


def of_nothing(self: Any, scores: Any, qrels: Any, results: Any, **_: Any) -> dict[str, float]:
    return {"p-MRR": 0.125}


@pytest.mark.parametrize(
    ("toy", "unit", "kind", "units"),
    [
        (("AbsTaskRetrieval", "Retrieval", "ndcg_at_10", retrieval), "query", "mean", 8),
        (("AbsTaskRetrieval", "Reranking", "map_at_1000", retrieval), "query", "mean", 8),
        (("AbsTaskRetrieval", "Retrieval", "mrr_at_10", retrieval), "query", "mean", 8),
        (("AbsTaskRetrieval", "Retrieval", "accuracy", retrieval), "query", "mean", 8),
        (("AbsTaskSTS", "STS", "cosine_spearman", rows(**PAIR, score=SAME)), "pair", "spearman", 40),
        (("AbsTaskPairClassification", "PairClassification", "max_ap", rows(**PAIR, labels=SAME)), "pair", "ap", 40),
        (("AbsTaskClassification", "Classification", "accuracy", labelled(CLASSES)), "text", "mean", 64),
        (("AbsTaskClassification", "Classification", "f1", labelled(CLASSES)), "text", "f1", 64),
        (("AbsTaskClustering", "Clustering", "v_measure", labelled(CLASSES)), "run", "mean", 10),
        (("AbsTaskSummarization", "Summarization", "cosine_spearman", rows(**SUMMARIES)), "text", "mean", 6),
        (("AbsTaskBitextMining", "BitextMining", "f1", rows(**PAIR)), "pair", "mean", 40),
        (
            ("AbsTaskMultilabelClassification", "MultilabelClassification", "lrap", labelled([[c] for c in CLASSES])),
            "run",
            "mean",
            10,
        ),
    ],
    ids=lambda value: "-".join(value[1:3]) if isinstance(value, tuple) else None,
)
def test_each_type_gives_its_score_again(tmp_path: Path, toy: Any, unit: str, kind: str, units: int) -> None:
    base, task_type, main, content = toy
    extra = {"max_document_to_embed": None, "max_fraction_of_documents_to_embed": 0.5, "samples_per_label": 4}
    extra |= {"min_score": 0, "max_score": 5}
    (done,) = run(task(base, task_type, main, content, **extra), tmp_path)
    ((found,),) = done.unit_scores
    assert (found.unit, found.kind, found.units) == (unit, kind, units)
    assert found.score() == pytest.approx(done.results[0].get_score(), abs=2e-5)
    assert 0 < abs(found.score()) < 1
    (again,) = run(task(base, task_type, main, content, **extra), tmp_path)
    assert again.computed == 0 and again.unit_scores[0][0].score() == found.score()
    assert not list(tmp_path.rglob(".predictions-*"))


def test_pairs_in_one_row_are_pairs(tmp_path: Path) -> None:
    content = rows(**{name: [values] for name, values in {**PAIR, "labels": SAME}.items()})
    (done,) = run(task("AbsTaskPairClassification", "PairClassification", "max_ap", content), tmp_path)
    assert done.unit_scores[0][0].units == 40


def test_subqueries_are_one_query(tmp_path: Path) -> None:
    main = "max_over_subqueries_map_at_1000"
    toy = task("AbsTaskRetrieval", "Reranking", main, retrieval, task_specific_scores=best_of_subqueries)
    (done,) = run(toy, tmp_path)
    assert done.unit_scores[0][0].units == 4
    assert done.unit_scores[0][0].score() == pytest.approx(done.results[0].get_score(), abs=2e-5)


def test_a_score_of_no_single_text_has_no_unit_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = task("AbsTaskRetrieval", "Retrieval", "p-MRR", retrieval, task_specific_scores=of_nothing)
    with caplog.at_level("INFO"):
        (done,) = run(toy, tmp_path)
    assert done.unit_scores == [[]] and done.results[0].get_score() == 0.125
    assert "Toy: no interval (no scores of single texts reproduce its p-MRR)" in caplog.text


def test_systems_have_the_same_units_in_the_same_order(tmp_path: Path) -> None:
    toy = task("AbsTaskRetrieval", "Retrieval", "ndcg_at_10", retrieval)
    ours, theirs = run(toy, tmp_path, HashSystem(), HashSystem("echo", seed=1))
    assert ours.unit_scores[0][0].key == theirs.unit_scores[0][0].key
    assert ours.unit_scores[0][0].predicted.tolist() != theirs.unit_scores[0][0].predicted.tolist()


def test_an_aggregate_is_its_parts_each_kept_by_itself(tmp_path: Path) -> None:
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    parts = [
        task("AbsTaskRetrieval", "Retrieval", "ndcg_at_10", retrieval),
        task("AbsTaskRetrieval", "Retrieval", "ndcg_at_10", retrieval, top_k=2),
    ]
    parts[1].metadata = parts[1].metadata.model_copy(update={"name": "Toy2"})

    class Both(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="Both",
            description="two toys",
            tasks=parts,
            main_score="ndcg_at_10",
            type="Retrieval",
            eval_splits=["test"],
            reference=None,
        )

    (first,) = run(parts[0], tmp_path)
    system = HashSystem()
    (done,) = run(Both(), tmp_path, system)
    assert done.computed == 1 and done.results[0].task_name == "Both"
    assert [found.units for found in done.unit_scores[0]] == [8, 8]
    assert done.unit_scores[0][0].predicted.tolist() == first.unit_scores[0][0].predicted.tolist()
    assert done.results[0].get_score() == pytest.approx(first.results[0].get_score(), abs=1e-5)
    (again,) = run(Both(), tmp_path)
    assert again.computed == 0
