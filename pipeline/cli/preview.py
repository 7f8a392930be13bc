"""The command try: a few rows through every stage, and what the whole run would take at their speed."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ParamsOption
from pipeline.core.config import PARAMS_FILE

if TYPE_CHECKING:
    from pipeline.backbone.sizes import ModelSizes
    from pipeline.cli.cost import Cost
    from pipeline.cli.plan import AllParams, Plan
    from pipeline.optim.gpus import Gpu
    from pipeline.preview.stages import Preview


def try_(
    n: Annotated[int, typer.Option("--n", min=2, max=1000, help="How many queries.")] = 16,
    params: ParamsOption = PARAMS_FILE,
) -> None:
    """Send a few queries through generate, embed and three steps of train; show each, and what the run would take.

    Writes nothing but .work/try. Exits with 1 if something looks wrong.
    """
    from pipeline.core.run import prepare_process

    prepare_process()
    from pipeline.cli.plan import load_all, make_plan
    from pipeline.generate.engines.registry import prepare_environment

    content = load_all(params)
    prepare_environment(content.generate.engine)
    plan = make_plan(content)
    found = _preview(content, n)
    _print(content, plan, found)
    sys.exit(bool(found.problems))


def _preview(params: "AllParams", count: int) -> "Preview":
    from pipeline.collect.spill import scratch_folder
    from pipeline.core.errors import section
    from pipeline.core.run import work_dir
    from pipeline.preview.queries import few_queries
    from pipeline.preview.stages import Sections, run_stages

    with scratch_folder(work_dir("try")) as scratch:
        (scratch / "collect").mkdir()
        with section("collect"):
            few = few_queries(params.collect, params.backbone, count, scratch / "collect")
        print(f"{few.table.num_rows} queries, {few.origin}")
        sections = Sections(params.backbone, params.collect, params.generate, params.embed, params.train)
        return run_stages(sections, few.table, scratch)


def _print(params: "AllParams", plan: "Plan", found: "Preview") -> None:
    from pipeline.preview.show import loss_lines, row_lines

    print(*row_lines(found), sep="\n")
    if found.losses:
        print("losses of steps of train over these rows:", *loss_lines(found), sep="\n")
    print(*estimate_lines(params, plan, found), sep="\n")
    for note in (*found.notes, *plan.remarks):
        print(f"note: {note}")
    print("what looks wrong:" if found.problems else "nothing looks wrong")
    for problem in found.problems:
        print(f"  {problem}")


def estimate_lines(params: "AllParams", plan: "Plan", found: "Preview") -> Iterator[str]:
    """What was measured on the rows, and from it time, memory and disk of the whole run on this machine."""
    from pipeline.cli.cost import cost_lines, cost_table, make_costs
    from pipeline.cli.plan import backbone_sizes
    from pipeline.optim.gpus import gpu_at_hand

    yield "measured on these rows (of main memory the peak so far):"
    for stage, speed in found.speeds.items():
        memory = ", ".join(f"{name} {mib:,} MiB" for name, mib in found.memory[stage].items())
        rate = f"{speed.tokens / max(speed.seconds, 1e-9):.0f} tokens/s"
        started = f", started in {speed.startup_seconds:.0f} s" if speed.startup_seconds else ""
        done = f"{speed.rows} rows, {speed.tokens:,} tokens in {speed.seconds:.1f} s: {rate}{started}"
        yield f"  {stage:<9} {done}; {memory}"
    gpu = gpu_at_hand()
    machine = gpu or measured_machine(found, backbone_sizes(params.backbone), params)
    yield "the whole run on this machine at this speed, which more rows at a time raise:"
    yield from cost_table(whole_run(params, found, make_costs(params, machine)))
    if gpu is not None:
        yield from cost_lines(make_costs(params, gpu), gpu)
    yield "memory of the whole run, computed for rows of full length:"
    yield from (
        f"  {stage:<9} {on_what}" for stage, _, on_what in plan.lines if stage in ("generate", "teach", "train")
    )


def measured_machine(found: "Preview", sizes: "ModelSizes | None", params: "AllParams") -> "Gpu | None":
    """This machine in the words of a data sheet, by its speed in train and generate; None where train has none."""
    import psutil

    from pipeline.backbone.loading import DTYPE_BYTES
    from pipeline.cli.cost import BANDWIDTH_SHARE, COMPUTE_SHARE
    from pipeline.optim.gpus import Gpu

    train, generate = found.speeds.get("train"), found.speeds.get("generate")
    if sizes is None or train is None or generate is None or not (train.flops and generate.tokens):
        return None
    # A step of decoding reads the weights once for all rows: as many steps as the longest answer has tokens.
    steps = max(found.answers["response_tokens"].to_pylist())
    moved = sizes.parameters() * DTYPE_BYTES[params.generate.dtype] * steps
    return Gpu(
        "this machine",
        flops=train.flops / train.seconds / COMPUTE_SHARE,
        bandwidth=moved / max(generate.seconds, 1e-9) / BANDWIDTH_SHARE,
        memory=float(psutil.virtual_memory().total),
        source="measured",
    )


def whole_run(params: "AllParams", found: "Preview", computed: Sequence["Cost"]) -> list["Cost"]:
    """The costs with the measured time of each stage that was tried, in proportion to its rows."""
    from pipeline.cli.cost import CLOSED_FORM
    from pipeline.cli.plan import expected_rows
    from pipeline.train.params import planned_steps

    rows, _ = expected_rows(params)
    if rows is None:
        counts: dict[str, int] = {}
    else:
        trained = round(rows * (1 - params.collect.heldout_fraction))
        steps = planned_steps(trained, params.train) * params.train.batch_size
        counts = {"generate": rows, "embed": rows, "train": steps}
    return [
        replace(cost, seconds=_in_proportion(found, cost.stage, counts.get(cost.stage), cost.parts.get(CLOSED_FORM)))
        if cost.stage in ("generate", "embed", "train")
        else cost
        for cost in computed
    ]


def _in_proportion(found: "Preview", stage: str, rows: int | None, once: float | None = None) -> float | None:
    """Seconds for so many rows, and `once` for what was not tried."""
    speed = found.speeds.get(stage)
    if speed is None or rows is None or not speed.rows:
        return None
    return speed.startup_seconds + (once or 0.0) + speed.seconds / speed.rows * rows
