"""Live figures: what DVCLive writes of them, how often progress is logged, and a tracker that is not installed."""

import json
import math
from pathlib import Path

import pytest

from pipeline.core import tracking as module
from pipeline.core.config import read_yaml
from pipeline.core.errors import ParamsError, section
from pipeline.core.tracking import ProgressLog, tracking

LIVE = Path("results/live/train")


def figures(resume: bool, **steps: float) -> None:
    with tracking("dvclive", "train", resume=resume) as log:
        assert log is not None
        for step, loss in steps.items():
            log({"loss": loss, "heldout/mrr": math.nan}, int(step.removeprefix("at_")))


def points() -> list[list[str]]:
    return [line.split("\t") for line in (LIVE / "plots/metrics/loss.tsv").read_text().splitlines()[1:]]


def test_dvclive_writes_metrics_and_plots_that_dvc_finds(workspace: Path) -> None:
    figures(False, at_1=1.0, at_2=0.5)
    assert json.loads((LIVE / "metrics.json").read_text()) == {"loss": 0.5, "step": 2}
    assert read_yaml(LIVE.parent / "dvc.yaml") == {
        "metrics": ["train/metrics.json"], "plots": [{"train/plots/metrics": {"x": "step"}}]
    }  # fmt: skip


def test_a_resumed_run_goes_on_and_a_new_one_begins_again(workspace: Path) -> None:
    figures(False, at_1=1.0, at_2=0.5)
    figures(True, at_3=0.25)
    assert [line[-2:] for line in points()] == [["1", "1.0"], ["2", "0.5"], ["3", "0.25"]]
    figures(False, at_1=2.0)
    assert [line[-2:] for line in points()] == [["1", "2.0"]]


def test_without_a_tracker_nothing_is_written(workspace: Path) -> None:
    with tracking(None, "train", resume=False) as log:
        assert log is None
    assert not Path("results").exists()


def test_a_tracker_that_is_not_installed_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for kind in ("dvclive", "wandb"):
        with (
            pytest.raises(ParamsError, match=f"^train.track: {kind} is not installed: pip install"),
            section("train"),
            tracking(kind, "train", resume=False),  # type: ignore[arg-type]
        ):
            pass


def test_progress_is_logged_now_and_then_and_at_the_end() -> None:
    logged: list[tuple[int, float]] = []
    log = ProgressLog(lambda values, step: logged.append((step, values["progress"])), seconds=60)
    for done in (1, 2, 3, 4):
        log(done, 4, 10.0)
    assert logged == [(1, 0.25), (4, 1.0)]
    every = ProgressLog(lambda values, step: logged.append((step, values["tokens_per_second"])), seconds=0)
    every(5, 9, 12.0)
    assert logged[-1] == (5, 12.0)
