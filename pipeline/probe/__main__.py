"""Stage probe: one question about the systems -> results/probe/<name>/. `python -m pipeline.probe NAME`."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from pipeline.core.artifacts import Artifact, create
from pipeline.core.config import PARAMS_FILE, EntryName, Params, load
from pipeline.core.errors import nested_in, section
from pipeline.core.files import to_json, write_bytes
from pipeline.core.paths import DELTAS_TABLE, PROBE_DIR, QUERIES_DIR, ROWS_TABLE
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.evaluate.build import (
    MEMORY_PARAMS,
    SystemInputs,
    Systems,
    encoder_artifact,
    make_systems,
    manifest_params,
    own_instructions,
    queries_artifact,
)
from pipeline.evaluate.deltas import deltas_table
from pipeline.evaluate.standardized import STANDARDIZATION_FILE, standardization_bytes
from pipeline.generate.engines.registry import prepare_environment
from pipeline.probe.base import ProbeContext, ProbeResult, find_probe, probe_params


class Inputs(SystemInputs):
    """The sections that this stage reads; each probe validates its own entry of `probes`."""

    probes: dict[EntryName, Any]


def run(inputs: Inputs, name: str, params: Params, run_record: RunRecord) -> None:
    """Run the probe `name` and write its result and the rows behind it."""
    prepare_environment(inputs.generate.engine)
    encoder, evaluate = encoder_artifact(), inputs.evaluate
    with closing(make_systems(inputs)) as systems:
        context = ProbeContext(
            systems=systems,
            names=evaluate.systems,
            local_dir=Path(evaluate.local_dir),
            work=work_dir("probe") / name,
            dtype=evaluate.dtype,
            bootstrap=evaluate.bootstrap,
            instructions=own_instructions(inputs),
        )
        with section("probes"), nested_in(name):
            result = find_probe(name).run(params, context)
    with create(
        PROBE_DIR / name,
        kind="probe",
        params=manifest_params(inputs, probe=name, settings=params.model_dump()),
        models={system: facts["identity"] for system, facts in result.systems.items()},
        inputs=[encoder, *_queries_of(systems, result), *result.inputs],
    ) as out:
        if systems.standardizations:
            write_bytes(out.path / STANDARDIZATION_FILE, standardization_bytes(systems.standardizations))
        out.write_table(ROWS_TABLE, result.rows)
        out.write_table(DELTAS_TABLE, deltas_table(result.deltas))
        content = {"probe": name, "metrics": result.metrics, "systems": result.systems}
        (out.path / "result.json").write_text(to_json(content), encoding="utf-8")
        for file, text in result.pages.items():
            (out.path / file).write_text(text, encoding="utf-8")
    deltas = [asdict(delta) for delta in result.deltas]
    run_record.update(probe=name, metrics=result.metrics, deltas=deltas, systems=result.systems)


def _queries_of(systems: Systems, result: ProbeResult) -> list[Artifact]:
    """The queries that standardised systems were fitted on, if the probe itself did not read them."""
    read = any(artifact.path == QUERIES_DIR for artifact in result.inputs)
    return [queries_artifact()] if systems.standardizations and not read else []


def main(
    name: str = typer.Argument(help="An entry of `probes`."),
    params: Path = typer.Option(PARAMS_FILE, help="The params file."),
) -> None:
    """Run a probe for every system."""
    prepare_process()
    with user_errors(), device_memory(*MEMORY_PARAMS):
        inputs = load(params, Inputs)
        settings = probe_params(inputs.probes, name, str(params))
        with record("probe", PROBE_DIR / f"{name}.json") as run_record:
            run(inputs, name, settings, run_record)


if __name__ == "__main__":
    typer.run(main)
