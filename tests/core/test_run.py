"""What every stage does around its work."""

import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from pipeline.core import run as runtime
from pipeline.core.errors import ArtifactError, DeviceMemoryError
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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_a_process_at_once_that_is_still_cleaning_up(first: signal.Signals) -> None:
    code = (
        "import time\nfrom pipeline.core.run import user_errors\n"
        "with user_errors():\n"
        "    try:\n        print('working', flush=True); time.sleep(100)\n"
        "    finally:\n        print('cleaning up', flush=True); time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for number, said in ((first, "working\n"), (signal.SIGINT, "cleaning up\n")):
            assert process.stdout.readline() == said
            process.send_signal(number)
        assert process.wait(timeout=120) == -signal.SIGINT


def test_a_mistake_of_the_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), runtime.user_errors():
        _ = 1 / 0


STAGES = ["train", "teach", "embed", "evaluate", "probe"]
ARGUMENTS = {"evaluate": ["local"], "probe": ["safety"]}


def call_stage(stage: str, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage's command in process with this in place of its work."""
    module = importlib.import_module(f"pipeline.{stage}.__main__")
    monkeypatch.setattr(module, "run", work)
    monkeypatch.delenv("RANK", raising=False)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [*ARGUMENTS.get(stage, []), "--params", str(ROOT / "params.yaml")])


def fill_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB, of which ...")


@pytest.mark.parametrize("stage", [*STAGES, "generate"])
def test_a_lack_of_memory_is_one_line_that_names_params(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    done = call_stage(stage, fill_memory, monkeypatch)
    assert done.exit_code == 1
    found = re.fullmatch(r"error: out of memory \(no room for another 2\.00 GiB\): lower (.*)\n", done.stderr)
    assert found, done.stderr
    for param in found[1].split(" or "):
        model = importlib.import_module(f"pipeline.{stage}.__main__").Inputs
        for name in param.split("."):
            if fields := getattr(model, "model_fields", None):  # an engine's options are free
                assert name in fields, param
                model = fields[name].annotation


def test_a_lack_of_memory_says_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 75 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    with pytest.raises(DeviceMemoryError) as caught, runtime.device_memory("train.micro_batch_size"):
        fill_memory()
    assert str(caught.value).endswith(
        "H100: 70.0 GiB allocated, 75.0 GiB reserved by this process, 80.0 GiB in all: lower train.micro_batch_size"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeviceMemoryError("encoder process 0: out of memory"), DeviceMemoryError),
        (RuntimeError("CUDA error: out of memory"), DeviceMemoryError),
        (RuntimeError("shape mismatch"), RuntimeError),
    ],
)
def test_other_signs_of_a_lack_of_memory(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, runtime.device_memory("a", "b"):
        raise error
    assert str(caught.value).endswith(": lower a or b") is (kind is DeviceMemoryError)


@pytest.mark.parametrize("stage", STAGES)
def test_blocks_of_gpu_memory_grow(workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    seen: list[list[str | None]] = []
    monkeypatch.delenv(names[0], raising=False)
    for other in (None, "backend:native"):
        if other:
            monkeypatch.setenv(names[1], other)
        call_stage(stage, lambda *_: seen.append([os.environ.get(name) for name in names]), monkeypatch)
    assert seen == [["expandable_segments:True", None], [None, "backend:native"]]
    assert names[0] not in os.environ


def test_torch_is_not_imported_before_its_settings_are_made() -> None:
    imports = "; ".join(f"import pipeline.{stage}.__main__" for stage in STAGES)
    code = f"import sys; {imports}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


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


NOTES = (
    "import os, warnings; from pipeline.core.run import setup_logging; setup_logging();"
    "warnings.warn('later', FutureWarning); warnings.warn('yours', UserWarning);"
    "print(os.environ['TORCH_CPP_LOG_LEVEL'])"
)


def test_notes_to_programmers_are_hidden_and_warnings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    done = subprocess.run([sys.executable, "-c", NOTES], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "ERROR\n"
    assert "yours" in done.stderr and "later" not in done.stderr


def test_the_users_options_show_notes_to_programmers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    command = [sys.executable, "-W", "default", "-c", NOTES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "INFO\n"
    assert "later" in done.stderr


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


@pytest.mark.parametrize(
    ("busy", "users", "expected"),
    [
        (10.0, {}, (None, "5000")),
        (70.0, {}, ("PASSIVE", None)),
        (70.0, {"GOMP_SPINCOUNT": "7"}, (None, "7")),
        (10.0, {"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ],
    ids=["an idle machine", "a busy machine", "the user's spins", "the user's policy"],
)
def test_threads_do_not_spin_beside_other_work_unless_the_user_says_how_they_wait(
    monkeypatch: pytest.MonkeyPatch, busy: float, users: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in runtime.WAIT_VARIABLES} | users
    monkeypatch.setattr(runtime.os, "environ", environment)
    monkeypatch.setattr(runtime.psutil, "cpu_percent", lambda interval: busy)
    runtime.prepare_threads()
    assert (environment.get("OMP_WAIT_POLICY"), environment.get("GOMP_SPINCOUNT")) == expected


@pytest.mark.parametrize(
    "entry",
    [
        "from pipeline.core.run import prepare_process as main; main()",
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('pipeline', run_name='__main__')",
    ],
)
def test_imports_are_not_searched_for_garbage_all_the_time(entry: str) -> None:
    code = f"import atexit, gc; atexit.register(lambda: print('threshold', gc.get_threshold()[0])); {entry}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout.split("threshold ")[1]) == runtime.GARBAGE_THRESHOLD
