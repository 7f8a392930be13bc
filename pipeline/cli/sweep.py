"""The command sweep: a DVC experiment for each of several backbones or sets of params, and their comparison."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.config import PARAMS_FILE, read_yaml
from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.core.paths import RESULTS_DIR

PARAMS_SUFFIXES = (".yaml", ".yml")


def sweep(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="A preset of a backbone, or a YAML file of params.")
    ],
    memory: Annotated[int, typer.Option(help="GPU memory in GB that presets are sized for: 24 or 80.")] = 80,
    output: Annotated[
        Path, typer.Option("--output", help="Write the comparison to a .html, .md or .json file.")
    ] = RESULTS_DIR / "compare.html",
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare other data, mteb versions or instructions, and say so.")
    ] = False,
) -> None:
    """Queue a DVC experiment for each name, run them one after another, and compare their students.

    A preset brings backbone and teacher together; the values of a file go over those of params.yaml, which is
    as before at the end.
    """
    from pipeline.cli.look import compare as compare_runs
    from pipeline.cli.look import comparison_format

    comparison_format(output)
    experiments = {experiment_name(name): name for name in names}
    if len(experiments) < max(2, len(names)):
        raise ParamsError(f"{', '.join(names)}: give two or more, each once", argument="names")
    for name in names:  # a mistake in the last one must not show after the first has run
        with changed_params(name, memory):
            pass
    for experiment, name in experiments.items():
        with changed_params(name, memory) as changes:
            print(f"{experiment}: {'; '.join(changes) or 'params.yaml as it is'}")
            _dvc("exp", "run", "--queue", "--name", experiment)
    _dvc("exp", "run", "--run-all", check=False)
    finished = _finished(list(experiments))
    if missing := [name for name in experiments if name not in finished]:
        message = f"no results of {', '.join(missing)} (`dvc queue logs NAME` says why); finished rows are kept"
        if len(finished) < 2:
            raise EvaluationError(message)
        print(f"error: {message}", file=sys.stderr)
    compare_runs(finished, output, allow_different)
    sys.exit(bool(missing))


def experiment_name(name: str) -> str:
    """A preset's own name, or that of a file without its ending."""
    return Path(name).stem if name.endswith(PARAMS_SUFFIXES) else name


@contextmanager
def changed_params(name: str, memory: int) -> Iterator[list[str]]:
    """In the block params.yaml has the params of a preset or file; gives the changes, one line each.

    A local model is named by its absolute path: an experiment runs in a folder of its own, which lacks it.

    Raises:
        ParamsError: there is no such preset or file, or params.yaml with it has mistakes.
    """
    from pipeline.cli.plan import load_all
    from pipeline.cli.presets import lay_over, switch

    before = PARAMS_FILE.read_bytes() if PARAMS_FILE.is_file() else None
    try:
        if name.endswith(PARAMS_SUFFIXES):
            changes = lay_over(PARAMS_FILE, read_yaml(Path(name)))
        else:
            changes = switch(PARAMS_FILE, name, memory)
        lay_over(PARAMS_FILE, absolute_models(read_yaml(PARAMS_FILE)))
        load_all(PARAMS_FILE)
        yield changes
    finally:
        if before is not None:
            PARAMS_FILE.write_bytes(before)


def absolute_models(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `name` of each mapping that is a folder by a relative path, as an absolute one, where it stands.

    A list that has such mappings, as of a teacher's adapters, is there as a whole.
    """
    found: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            if inner := absolute_models(value):
                found[key] = inner
        elif isinstance(value, list):
            moved = [{**item, **absolute_models(item)} if isinstance(item, Mapping) else item for item in value]
            if moved != value:
                found[key] = moved
        elif key == "name" and isinstance(value, str) and not Path(value).is_absolute() and Path(value).is_dir():
            found[key] = str(Path(value).resolve())
    return found


def _finished(experiments: list[str]) -> list[str]:
    """Those that are an experiment with results."""
    from pipeline.compare.runs import open_run

    found = []
    for name in experiments:
        try:
            open_run(name)
        except EvaluationError:
            continue
        found.append(name)
    return found


def _dvc(*arguments: str, check: bool = True) -> None:
    """DVC with this interpreter's environment; experiments share the work in progress of this workspace.

    Raises EvaluationError if it fails, unless `check` is False.
    """
    work = Path(os.environ.get("PIPELINE_WORK_DIR", ".work")).resolve()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PIPELINE_WORK_DIR": str(work)}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], env=environment, check=False)
    if check and done.returncode:
        raise EvaluationError(
            f"`dvc {' '.join(arguments)}` failed (see above). An experiment of that name: `dvc exp remove NAME` first"
        )
