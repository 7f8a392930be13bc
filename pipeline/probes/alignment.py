"""Held-out alignment: does the embedding of an unseen query lie at its answer?

For every held-out query: the cosine between the system's embedding of the *query* and the target (the teacher's
embedding of the backbone's *response*), and the rank of that target among the targets of all held-out responses.
Student, untrained student and teacher are measured in the teacher's space; backbone mean pooling in its own, where it
embeds the responses itself. Queries are read as in training, without an instruction.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import EvaluationError
from pipeline.evaluation.systems import System
from pipeline.heldout import heldout_rows
from pipeline.params import Params
from pipeline.probes.base import ProbeContext, ProbeResult, described
from pipeline.ranking import rank_own

ROWS = pa.schema(
    [
        ("system", pa.string()),
        ("id", pa.string()),
        ("cosine", pa.float32()),
        ("rank", pa.int32()),
        ("nearest", pa.string()),
    ]
)
_OWN_SPACE = frozenset({"backbone-mean"})


class AlignmentParams(Params):
    """Nothing to choose: the held-out rows and the systems of `evaluate` say all."""


PARAMS = AlignmentParams


def run(params: AlignmentParams, context: ProbeContext) -> ProbeResult:
    """Measure every system on the held-out rows.

    Raises:
        EvaluationError: no held-out query has a target, or widths differ.
        ArtifactError: an artifact is missing or damaged.
    """
    artifacts, rows = heldout_rows()
    metrics: dict[str, Any] = {"candidates": rows.num_rows}
    systems, tables = {}, []
    for system in context.build():
        queries, answers = _embed(system, rows)
        table = ranked(system.name, rows["id"].to_pylist(), queries, answers)
        metrics |= {f"{system.name}/{key}": value for key, value in alignment_metrics(table).items()}
        systems[system.name] = {**described(system), "space": _space(system)}
        tables.append(table)
    return ProbeResult(metrics, pa.concat_tables(tables), systems, artifacts)


def _space(system: System) -> str:
    return "its own" if system.name in _OWN_SPACE else "the teacher's"


def _embed(system: System, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    from pipeline.encoder.data import embeddings_matrix

    queries = system.encode(rows["text"].to_pylist(), "")
    if system.name in _OWN_SPACE:
        return queries, system.encode(rows["response"].to_pylist(), "")
    targets = embeddings_matrix(rows["embedding"])
    if queries.shape[1] != targets.shape[1]:
        raise EvaluationError(
            f"{system.name} embeds in {queries.shape[1]} dimensions, data/targets has {targets.shape[1]}: "
            "the encoder was trained on other targets; run train again"
        )
    return queries, targets


def ranked(system: str, ids: list[str], queries: np.ndarray, answers: np.ndarray) -> pa.Table:
    """Per query the cosine to its own answer, that answer's rank (1 is best, ties count against) and the nearest id."""
    found = rank_own(queries, answers)
    columns = {
        "system": [system] * len(ids),
        "id": ids,
        "cosine": found.cosines.astype(np.float32),
        "rank": found.ranks.astype(np.int32),
        "nearest": [ids[at] for at in found.nearest],
    }
    return pa.table(columns, schema=ROWS)


def alignment_metrics(rows: pa.Table) -> dict[str, float]:
    """Mean cosine, top-1 accuracy and mean reciprocal rank of one system's rows."""
    return {
        "cosine": round(pc.mean(rows["cosine"]).as_py(), 6),
        "top1": round(pc.mean(pc.cast(pc.equal(rows["rank"], 1), pa.float64())).as_py(), 6),
        "mrr": round(pc.mean(pc.divide(1.0, pc.cast(rows["rank"], pa.float64()))).as_py(), 6),
    }
