"""A finished toy workspace with results, and one whose results have intervals."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.core.artifacts import create
from pipeline.core.files import write_json
from tests.report.toy_results import ALIGNMENT, NOISE, NOT_DRAWN, RECORD, SAFER, SAFETY, SAMPLE, SUITE, SYSTEMS
from tests.toy_workspace import make_workspace


@pytest.fixture
def made(workspace: Path) -> Path:
    make_workspace(Path())
    results = Path("results")
    for stage in ("collect", "generate", "embed"):
        write_json(results / f"{stage}.json", {"stage": stage, **RECORD})
    write_json(results / "train.json", {"stage": "train", "steps": 20, "first_batch": {"align": 2.0}, **RECORD})
    lines = [f"{step},3,{2 / step},{1 / step},1e-4" for step in range(1, 21)]
    (results / "train").mkdir()
    (results / "train/loss.csv").write_text("\n".join(["step,loss,align,recon,learning_rate", *lines]) + "\n")
    scores = ["step,cosine,top1,mrr,recon", "0,0.1,0.2,0.3,4", "3,0.4,0.5,0.6,2"]
    (results / "train/heldout.csv").write_text("\n".join(scores) + "\n")
    write_json(results / "evaluate/demo.json", {"metrics": SUITE, "systems": SYSTEMS, **RECORD})
    probes = {"alignment": ALIGNMENT, "safety": SAFETY, "interpret": {"queries": 1, "student/faithfulness": 0.5}}
    for name, metrics in probes.items():
        write_json(results / f"probe/{name}.json", {"metrics": metrics, "systems": SYSTEMS, **RECORD})
    with create(results / "probe/interpret", kind="probe", params={}) as out:
        out.write_table("rows.parquet", pa.Table.from_pylist([SAMPLE]))
    return Path()


@pytest.fixture
def judged(made: Path) -> Path:
    write_json(Path("results/probe/safety.json"), {"metrics": SAFETY, "systems": SYSTEMS, "deltas": [SAFER], **RECORD})
    deltas = [NOISE, NOT_DRAWN]
    write_json(Path("results/evaluate/demo.json"), {"metrics": SUITE, "systems": SYSTEMS, "deltas": deltas, **RECORD})
    return made
