"""What every stage does around its work."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core import run as runtime
from pipeline.core.errors import ArtifactError
from tests.conftest import ROOT


def test_a_pipeline_error_is_one_message_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, runtime.user_errors():
        raise ArtifactError("data/queries is not finished")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: data/queries is not finished\n"


def test_an_interrupt_says_what_is_kept_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, runtime.user_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert "finished work is kept" in capsys.readouterr().err


def test_a_mistake_of_the_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), runtime.user_errors():
        _ = 1 / 0


def test_a_record_holds_what_was_reported_and_where_it_ran(workspace: Path) -> None:
    with runtime.record("collect") as run:
        run.update(rows=3)
        run.update(rows=4, sources={"a": 1})
    facts = json.loads((workspace / "results" / "collect.json").read_text())
    assert facts["stage"] == "collect"
    assert facts["rows"] == 4
    assert facts["sources"] == {"a": 1}
    assert 0 <= facts["seconds"] < 60
    assert 10 < facts["peak_memory_mib"] < 100_000
    environment = facts["environment"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["versions"]["pyarrow"] == importlib.metadata.version("pyarrow")
    assert 1 <= environment["cores"] <= (os.cpu_count() or 1)
    assert environment["memory_gib"] > 0


def test_a_record_can_go_elsewhere(workspace: Path) -> None:
    with runtime.record("evaluate", Path("results/evaluate/demo.json")):
        pass
    assert json.loads((workspace / "results/evaluate/demo.json").read_text())["stage"] == "evaluate"


def test_a_failed_stage_leaves_no_record(workspace: Path) -> None:
    with pytest.raises(ArtifactError), runtime.record("collect"):
        raise ArtifactError("no")
    assert not (workspace / "results").exists()


def test_work_in_progress_moves_with_its_variable(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.work_dir("generate") == Path(".work/generate")
    monkeypatch.setenv("PIPELINE_WORK_DIR", "/big/disk")
    assert runtime.work_dir("generate") == Path("/big/disk/generate")


def test_progress_yields_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(runtime.progress(range(3), total=5, desc="rows", initial=2)) == [0, 1, 2]
    assert "rows: 100%" in capsys.readouterr().err


def test_progress_writes_whole_lines_in_a_log_and_one_live_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    list(runtime.progress(range(3), total=3, desc="rows", terminal=False))
    lines = capsys.readouterr().err
    assert "\r" not in lines
    shown = [line.split("|")[0] for line in lines.splitlines()]
    assert shown[:4] == ["rows:   0%", "rows:  33%", "rows:  67%", "rows: 100%"]
    assert set(shown[4:]) == {"rows: 100%"}  # and no empty line
    list(runtime.progress(range(3), total=3, desc="rows", terminal=True))
    assert "\r" in capsys.readouterr().err


def test_logging_shows_our_events_and_the_warnings_of_libraries() -> None:
    code = (
        "import logging; from pipeline.core.run import setup_logging; setup_logging();"
        "logging.getLogger('pipeline.core.row_store').info('ours');"
        "logging.getLogger(__name__).info('the stage itself');"
        "logging.getLogger('other').info('hidden');"
        "logging.getLogger('other').warning('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "INFO ours\nINFO the stage itself\nWARNING theirs\n")


def test_the_foundation_loads_no_heavy_package() -> None:
    code = (
        "import sys, pipeline.core.run, pipeline.core.config, pipeline.core.schemas, pipeline.core.row_store;"
        "print(sorted({'torch', 'transformers', 'vllm', 'dvc', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_folder_that_is_no_git_checkout_has_no_revision(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(workspace.parent))
    assert runtime.environment()["git_revision"] is None
