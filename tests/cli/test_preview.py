"""The command try: what it prints, what it writes, and the whole run in proportion to a few rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from pipeline.__main__ import app
from pipeline.backbone.sizes import ModelSizes
from pipeline.cli.cost import BANDWIDTH_SHARE, COMPUTE_SHARE, Cost
from pipeline.cli.plan import AllParams, load_all
from pipeline.cli.preview import measured_machine, whole_run
from pipeline.core.config import read_yaml
from pipeline.core.schemas import QUERIES
from pipeline.preview.stages import Preview, Speed
from tests.conftest import ROOT
from tests.stage_runs import write_params


def demo(**sections: dict[str, Any]) -> dict[str, Any]:
    """params.demo.yaml with other keys of some sections."""
    params = read_yaml(ROOT / "params.demo.yaml")
    for name, keys in sections.items():
        params[name] = {**params[name], **keys}
    return params


@pytest.fixture
def project(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    """A workspace with params of a tiny backbone and twelve queries in its source."""
    write_params(
        **demo(
            backbone={"name": str(tiny_backbone("llama"))},
            collect={"local_dir": "sources", "near_duplicates": None},
            generate={"engine": "echo", "options": {}, "max_new_tokens": 64},
            embed={"transform": {"kind": "none"}},
            evaluate={"local_dir": "tasks"},
            train={"max_response_tokens": 80, "response_form": "beside"},
        )
    )
    for name in ("sources", "tasks"):
        (workspace / name).mkdir()
    texts = [{"text": f"question number {number}"} for number in range(10, 22)]
    (workspace / "sources/queries.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, texts))))
    return workspace


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["try", *map(str, arguments)])


def test_it_shows_each_row_and_the_whole_run(project: Path) -> None:
    files = {path for path in project.rglob("*") if path.is_file()}
    result = call("--n", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("4 queries, the first rows of each source: read 12")
    assert next(line for line in lines if line.startswith("  prompt")).startswith("  prompt   21 tokens: <|user|>")
    assert sum(line.startswith("  target   length") for line in lines) == 4
    assert any(line.startswith("  before any update") for line in lines)
    table = {line.split()[0]: line.split() for line in lines[lines.index(whole(lines)) :] if line.startswith("  ")}
    assert {"generate", "embed", "train", "together"} <= table.keys()
    assert "-" not in table["train"]
    assert any(line.startswith("  train") and "at a time: at most" in line for line in lines)
    assert "nothing looks wrong" in lines
    written = {path for path in project.rglob("*") if path.is_file()} - files
    assert all(path.relative_to(project).parts[:2] == (".work", "try") for path in written)
    assert not list((project / ".work/try").glob("scratch-*"))


def whole(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("the whole run on this machine"))


def test_what_looks_wrong_is_listed_last_and_fails_the_command(project: Path) -> None:
    params = read_yaml(Path("params.yaml"))
    write_params(**params | {"train": params["train"] | {"max_response_tokens": 8}})
    result = call("--n", 4)
    assert result.exit_code == 1
    where, problem = result.stdout.splitlines()[-2:]
    assert where == "what looks wrong:"
    assert problem.startswith("  train fails: train.max_response_tokens: ")


# --- the whole run by hand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params() -> AllParams:
    return load_all(ROOT / "params.demo.yaml")


def tried(**speeds: Speed) -> Preview:
    return Preview(QUERIES.empty_table(), speeds=speeds)


def test_time_grows_with_the_rows_and_the_start_does_not(params: AllParams) -> None:
    found = tried(
        generate=Speed(rows=4, tokens=100, seconds=2.0, startup_seconds=30.0),
        embed=Speed(rows=4, tokens=50, seconds=1.0),
        train=Speed(rows=12, tokens=600, seconds=6.0),
    )
    computed = [Cost(stage, None, 7.0) for stage in ("models", "generate", "embed", "train", "probe@reasoning")]
    costs = {cost.stage: cost for cost in whole_run(params, found, computed)}
    # 700 queries; 40 steps of 16 rows, of the 630 that are not held out.
    assert costs["generate"].seconds == pytest.approx(30 + 700 / 4 * 2)
    assert costs["embed"].seconds == pytest.approx(700 / 4)
    assert costs["train"].seconds == pytest.approx(40 * 16 * 6 / 12)
    assert costs["models"].seconds is None and {cost.disk for cost in costs.values()} == {7.0}


def test_the_closed_form_is_in_the_time_of_train(params: AllParams) -> None:
    computed = [Cost("train", 9.0, None, {"steps": 4.0, "closed form": 5.0})]
    (train,) = whole_run(params, tried(train=Speed(rows=12, tokens=600, seconds=6.0)), computed)
    assert train.seconds == pytest.approx(5 + 40 * 16 * 6 / 12)


def test_a_stage_that_was_not_reached_has_no_time(params: AllParams) -> None:
    computed = [Cost("generate", 5.0, None), Cost("train", 5.0, None)]
    found = tried(generate=Speed(rows=0, tokens=0, seconds=1.0))
    assert [cost.seconds for cost in whole_run(params, found, computed)] == [None, None]


def test_the_machine_is_described_by_its_speed(params: AllParams) -> None:
    sizes = ModelSizes(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=3, vocabulary=10, tied=True)
    found = tried(
        generate=Speed(rows=2, tokens=9, seconds=2.0), train=Speed(rows=2, tokens=9, seconds=4.0, flops=100.0)
    )
    found.answers = pa.table({"response_tokens": [4, 5]})
    machine = measured_machine(found, sizes, params)
    assert machine is not None
    assert machine.flops * COMPUTE_SHARE == pytest.approx(25)
    # Five times 376 numbers of two bytes in two seconds.
    assert params.generate.dtype == "bfloat16"
    assert machine.bandwidth * BANDWIDTH_SHARE == pytest.approx(5 * 376 * 2 / 2)
    assert measured_machine(tried(), sizes, params) is None
