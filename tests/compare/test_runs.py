"""Where the results of a run come from: a folder, a git revision, and what is no run."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compare.runs import open_run
from pipeline.core.errors import EvaluationError
from pipeline.core.paths import EVALUATE_DIR, SUMMARY_TABLE
from tests.compare.runs import write_run


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=Someone", "-c", "user.email=someone@localhost")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_a_revision_has_the_results_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True, capture_output=True)
    write_run(tmp_path, [0.0, 0.5])
    git("add", "--all")
    git("commit", "--quiet", "--message", "a run")
    git("tag", "before")
    write_run(tmp_path, [1.0, 0.5])
    assert open_run("before").unit_scores("demo", "search")[0].predicted.tolist() == [0.0, 0.5]
    assert open_run(".").unit_scores("demo", "search")[0].predicted.tolist() == [1.0, 0.5]
    with pytest.raises(EvaluationError, match="'nowhere'(?!.*results)"):  # the name is wrong, not its results
        open_run("nowhere")


def test_a_folder_without_results_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=str(tmp_path)):
        open_run(str(tmp_path))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    run = open_run(str(write_run(tmp_path / "a", [0.0, 1.0])))
    (tmp_path / "a" / EVALUATE_DIR / "demo" / SUMMARY_TABLE).write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match=SUMMARY_TABLE):
        run.summary("demo")
