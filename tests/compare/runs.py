"""Small finished runs, written as evaluate and probe write them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.artifacts import create
from pipeline.core.files import to_json, write_json
from pipeline.core.paths import EVALUATE_DIR, PROBE_DIR, ROWS_TABLE, SUMMARY_TABLE
from pipeline.evaluate.summary import SUMMARY
from pipeline.evaluate.unit_scores import UNIT_SCORES_DIR, UnitScores, save
from pipeline.probe.alignment import ROWS


def write_run(
    root: Path,
    queries: list[float],
    *,
    ranks: list[int] | None = None,
    systems: dict[str, Any] | None = None,
    params: str = "",
    **changes: Any,
) -> Path:
    """A run whose student has these scores of the queries of one task, and these ranks in the probe alignment.

    `systems` are what that probe says of them, `changes` are of columns of the summary, of `instructions`, and of the
    units' `key`.
    """
    folder = root / EVALUATE_DIR / "demo"
    score = float(np.mean(queries))
    row = {"task": "search", "task_type": "Retrieval", "metric": "ndcg_at_10", "main": True, "split": "test"}
    row |= {"subset": "default", "data_revision": "r1", "mteb_version": "2.0", "system": "student", "score": score}
    row |= {key: value for key, value in changes.items() if key in row}
    instructions = changes.get("instructions", "abc")
    with create(folder, kind="evaluation", params={"instructions": instructions}) as out:
        out.write_table(
            SUMMARY_TABLE, pa.Table.from_pylist([row, {**row, "system": "echo", "score": 0.9}], schema=SUMMARY)
        )
        units = UnitScores("test", "default", "query", changes.get("key", "k"), "mean", np.array([]), np.array(queries))
        save(out.path / UNIT_SCORES_DIR / "search.npz", [units])
    write_json(folder.with_suffix(".json"), {"seconds": 10 * len(queries)})
    if ranks is not None:
        _write_alignment(root / PROBE_DIR / "alignment", ranks, systems or {})
    (root / "params.yaml").write_text(params or "train: {epochs: 1}\n", encoding="utf-8")
    return root


def _write_alignment(folder: Path, ranks: list[int], systems: dict[str, Any]) -> None:
    ids = [f"q{index}" for index in range(len(ranks))]
    columns = {
        "system": ["student"] * len(ranks),
        "id": ids,
        "cosine": [0.5] * len(ranks),
        "rank": ranks,
        "nearest": ids,
        "overlap": [None] * len(ranks),
    }
    top1 = sum(rank == 1 for rank in ranks) / len(ranks)
    with create(folder, kind="probe", params={"settings": {}}) as out:
        out.write_table(ROWS_TABLE, pa.table(columns, schema=ROWS))
        metrics = {"candidates": len(ranks), "student/top1": top1, "echo/top1": 0.9, "student/cosine": 0.5}
        content = {"metrics": metrics, "systems": systems}
        (out.path / "result.json").write_text(to_json(content), encoding="utf-8")
