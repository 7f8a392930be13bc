"""Stage evaluate: a suite of tasks for every system -> results/evaluate/. `python -m pipeline.evaluate SUITE`."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from pipeline.core.artifacts import create
from pipeline.core.config import PARAMS_FILE, EntryName, load
from pipeline.core.errors import ParamsError, nested_in, section
from pipeline.core.files import write_bytes
from pipeline.core.paths import DELTAS_TABLE, ENCODER_DIR, EVALUATE_DIR, SUMMARY_TABLE
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.encoder.storage import Storage
from pipeline.evaluate.build import (
    MEMORY_PARAMS,
    SystemInputs,
    encoder_artifact,
    make_systems,
    manifest_params,
    own_instructions,
    queries_artifact,
)
from pipeline.evaluate.comparison import compare
from pipeline.evaluate.deltas import deltas_table, task_deltas
from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.evaluate.standardized import STANDARDIZATION_FILE, standardization_bytes
from pipeline.evaluate.stored import STUDENT, name_of, stored_facts, with_stored
from pipeline.evaluate.summary import flat_metrics, seed_spread, summary_table, write_mteb_format, write_unit_scores
from pipeline.generate.engines.registry import prepare_environment
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import SuiteParams, suite_tasks

log = logging.getLogger(__name__)


class Inputs(SystemInputs):
    """The sections that this stage reads."""

    suites: dict[EntryName, SuiteParams]


def run(inputs: Inputs, suite: str, run_record: RunRecord) -> None:
    """Run the suite and write its results to results/evaluate/<suite>/ and <suite>.json.

    Raises:
        ParamsError: there is no such suite.
        EvaluationError: a task or its data is missing.
        ArtifactError: the encoder is missing or damaged.
    """
    if suite not in inputs.suites:
        raise ParamsError(f"suites.{suite}: missing (there are: {', '.join(inputs.suites)})")
    evaluate = inputs.evaluate
    prepare_environment(inputs.generate.engine)
    encoder, tasks = encoder_artifact(), suite_tasks(inputs.suites, suite, Path(evaluate.local_dir))
    instructions = load_instructions(own_instructions(inputs))
    storages = [form.storage for form in evaluate.stored]
    width = _checked_width(storages) if storages else 0
    with section("evaluate"), closing(make_systems(inputs)) as systems:
        all_runs = run_systems(
            with_stored(systems.build(evaluate.systems), storages),
            tasks,
            instructions,
            work=work_dir("evaluate"),
            dtype=evaluate.dtype,
            model_name=evaluate.model_name,
        )
    forms = {name_of(storage) for storage in storages}
    runs = [run for run in all_runs if run.system not in forms]
    summary, all_deltas = summary_table(tasks, runs), task_deltas(tasks, all_runs, evaluate.bootstrap)
    deltas = [delta for delta in all_deltas if delta.system not in forms]
    with create(
        EVALUATE_DIR / suite,
        kind="evaluation",
        params=manifest_params(inputs, suite=inputs.suites[suite].model_dump(), instructions=instructions.digest),
        models={run.system: run.identity for run in runs},
        inputs=[encoder, *([queries_artifact()] if systems.standardizations else [])],
    ) as out:
        out.write_table(SUMMARY_TABLE, summary)
        out.write_table(DELTAS_TABLE, deltas_table(deltas))
        write_unit_scores(out.path, tasks, runs)
        write_mteb_format(out.path, runs)
        if systems.standardizations:
            write_bytes(out.path / STANDARDIZATION_FILE, standardization_bytes(systems.standardizations))
    metrics = flat_metrics(summary)
    run_record.update(
        suite=suite,
        tasks=len(tasks),
        metrics=metrics,
        deltas=[asdict(delta) for delta in deltas],
        seeds=seed_spread(metrics),
        systems={run.system: _facts(run) for run in runs},
    )
    if storages:
        beside = [run for run in all_runs if run.system in {STUDENT, *forms}]
        run_record.update(stored=stored_facts(storages, width, flat_metrics(summary_table(tasks, beside)), all_deltas))
    gains = compare(suite, run_record.facts).gains
    run_record.update(gains=[{**asdict(gain), "sentence": gain.sentence} for gain in gains])
    for gain in gains:
        log.info("%s, %s", suite, gain.sentence)


def _facts(run: SystemResults) -> dict[str, Any]:
    """What the record says of a system beside its scores."""
    return {
        "identity": run.identity,
        "prompting": run.prompting,
        "revision": run.meta.revision,
        "tasks_run_now": run.computed,
        "seconds": run.seconds,
    }


def _checked_width(storages: Sequence[Storage]) -> int:
    """Dimensions of the student's embeddings; raises SourceError if one of the storages keeps more."""
    from pipeline.encoder.folder.read import read_config

    width = read_config(ENCODER_DIR).embedding_width
    for index, storage in enumerate(storages):
        with section("evaluate"), nested_in(f"stored.{index}"):
            storage.check(width)
    return width


def main(
    suite: str = typer.Argument(help="An entry of `suites`."),
    params: Path = typer.Option(PARAMS_FILE, help="The params file."),
) -> None:
    """Run a suite of tasks for every system."""
    prepare_process()
    with user_errors(), device_memory(*MEMORY_PARAMS):
        inputs = load(params, Inputs)
        with record("evaluate", EVALUATE_DIR / f"{suite}.json") as run_record:
            run(inputs, suite, run_record)


if __name__ == "__main__":
    typer.run(main)
