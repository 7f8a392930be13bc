"""Held-out alignment: does the embedding of an unseen query lie at its answer?

- cosine: between the embedding of the *query* and the target, which is the teacher's embedding of the backbone's
  *response*; top1 and mrr: the rank of that target among the targets of all held-out responses
- overlap@10: share of a query's 10 nearest queries that are also among the 10 nearest by the teacher's targets
- anisotropy: mean cosine of all pairs of different queries; near 1 all embeddings point one way and cosines say little

Systems outside the teacher's space embed the responses themselves: ranks and neighbours are compared with the
student's, the cosine is not (no delta). hyde is an upper bound of the student where the engine answers as for training.
Queries are read as in training, without an instruction.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.bootstrap import BootstrapParams, Delta
from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError
from pipeline.core.vectors import anisotropy, matrix, neighbour_overlap, neighbours, rank_own
from pipeline.evaluate.system import System, encode_finite, in_teacher_space
from pipeline.probe.base import ProbeContext, ProbeResult, described, space_of, unit_deltas
from pipeline.probe.descriptions import Description
from pipeline.probe.heldout import heldout_rows

NEIGHBOURS = 10

ROWS = pa.schema(
    [
        ("system", pa.string()),
        ("id", pa.string()),
        ("cosine", pa.float32()),
        ("rank", pa.int32()),
        ("nearest", pa.string()),
        ("overlap", pa.float32()),
    ]
)


class AlignmentParams(Params):
    """No settings: the held-out rows and the systems of `evaluate` decide all."""


PARAMS = AlignmentParams
DESCRIPTION = Description(
    note="Each system embeds queries it never saw, without an instruction; the target is the teacher's "
    "embedding of the backbone's answer. cosine: to the own answer. top1, mrr: is the own answer the nearest among all "
    "held-out answers. overlap@10: share of a query's ten nearest queries that are also nearest by the targets. "
    "anisotropy: mean cosine of two different queries, near 1 where all embeddings point the same way.",
    lower_is_better=("anisotropy",),
    instructed=False,
)


def run(params: AlignmentParams, context: ProbeContext) -> ProbeResult:
    """Measure every system on the held-out rows.

    Raises EvaluationError if no held-out query has a target, widths differ, or an embedding is not finite.
    """
    artifacts, rows = heldout_rows()
    ids, targets = rows["id"].to_pylist(), matrix(rows["embedding"])
    count = min(NEIGHBOURS, len(ids) - 1)
    near_targets = neighbours(targets, count) if count else None
    metrics: dict[str, Any] = {"candidates": len(ids)}
    systems, tables, units = {}, [], {}
    for system in context.build():
        queries, answers = _embed(system, rows, targets)
        overlap = None if near_targets is None else neighbour_overlap(neighbours(queries, count), near_targets)
        table = ranked(system.name, ids, queries, answers, overlap)
        found = {**alignment_metrics(table), "anisotropy": anisotropy(queries)}
        metrics |= {f"{system.name}/{key}": value for key, value in found.items()}
        systems[system.name] = {**described(system), "space": space_of(system)}
        units[system.name] = {
            metric: column.to_numpy()
            for metric, column in _per_query(table).items()
            if not column.null_count and (metric != "cosine" or in_teacher_space(system))
        }
        tables.append(table)
        del system  # frees its memory before the next one is loaded
    deltas = unit_deltas(units, context.bootstrap)
    return ProbeResult(metrics, pa.concat_tables(tables), systems, artifacts, deltas)


def _embed(system: System, rows: pa.Table, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    texts, responses = rows["text"].to_pylist(), rows["response"].to_pylist()
    queries = encode_finite(system, texts, where="held-out queries")
    if not in_teacher_space(system):
        return queries, encode_finite(system, responses, side="document", where="held-out responses")
    if queries.shape[1] != targets.shape[1]:
        widths = f"{system.name} embeds in {queries.shape[1]} dimensions, data/targets has {targets.shape[1]}"
        raise EvaluationError(f"{widths}: the encoder was trained on other targets; run train again")
    return queries, targets


def ranked(
    system: str, ids: list[str], queries: np.ndarray, answers: np.ndarray, overlap: np.ndarray | None = None
) -> pa.Table:
    """Each query's cosine to its own answer, that answer's rank (1 is best, ties count against) and the nearest id.

    `overlap` is the share of common neighbours [N]; None for a single query.
    """
    found = rank_own(queries, answers)
    columns = {
        "system": [system] * len(ids),
        "id": ids,
        "cosine": found.cosines.astype(np.float32),
        "rank": found.ranks.astype(np.int32),
        "nearest": [ids[at] for at in found.nearest],
        "overlap": [None] * len(ids) if overlap is None else overlap.astype(np.float32),
    }
    return pa.table(columns, schema=ROWS)


def row_deltas(tables: Mapping[str, pa.Table], settings: Any, bootstrap: BootstrapParams) -> list[Delta]:
    """The student minus every other on the rows of `ROWS`, which are about the same queries in the same order."""
    units = {
        name: {metric: column.to_numpy() for metric, column in _per_query(rows).items() if not column.null_count}
        for name, rows in tables.items()
    }
    return unit_deltas(units, bootstrap)


def alignment_metrics(rows: pa.Table) -> dict[str, float | None]:
    """Mean cosine, top-1 accuracy, mean reciprocal rank and mean overlap@10 (None without) of one system's rows."""
    means = {metric: pc.mean(values).as_py() for metric, values in _per_query(rows).items()}
    return {metric: None if mean is None else round(mean, 6) for metric, mean in means.items()}


def _per_query(rows: pa.Table) -> dict[str, pa.ChunkedArray]:
    ranks = pc.cast(rows["rank"], pa.float64())
    return {
        "cosine": rows["cosine"],
        "top1": pc.cast(pc.equal(rows["rank"], 1), pa.float64()),
        "mrr": pc.divide(1.0, ranks),
        f"overlap@{NEIGHBOURS}": rows["overlap"],
    }
