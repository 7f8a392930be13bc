"""Commands about the params file: params, backbone."""

from typing import Annotated

import typer

from pipeline.cli.options import ParamsOption, print_table
from pipeline.core.config import PARAMS_FILE
from pipeline.core.errors import ParamsError


def params(
    path: ParamsOption = PARAMS_FILE,
    gpu: Annotated[str | None, typer.Option(help="Estimate times for this GPU, not for the one here.")] = None,
) -> None:
    """Check the whole params file; show what each stage will run, on what, with how much memory, time and disk."""
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.cost import cost_lines, make_costs
    from pipeline.cli.plan import load_all, make_plan
    from pipeline.optim.gpus import GPUS, gpu_at_hand

    if gpu is not None and gpu not in GPUS:
        raise ParamsError(f"no data sheet of {gpu} (there are: {', '.join(GPUS)})", argument="gpu")
    content, chosen = load_all(path), GPUS[gpu] if gpu else gpu_at_hand()
    plan, costs = make_plan(content), make_costs(content, chosen)
    table = Table("stage", "what", "on what", show_lines=True)
    for line in plan.lines:
        table.add_row(*map(escape, line))
    print_table(table)
    print("Estimates are upper bounds for rows of full length; their formulas: pipeline/optim/memory.py.")
    print("\n".join(cost_lines(costs, chosen)))
    for remark in plan.remarks:
        print(f"note: {remark}")


def backbone(
    name: Annotated[str | None, typer.Argument(help="A preset; without one, they are listed.")] = None,
    memory: Annotated[int, typer.Option(help="GPU memory in GB that the micro-batch is sized for: 24 or 80.")] = 80,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="echo (the backbone's own echo reading), trained (an LLM2Vec that the stage teach trains), or one of "
            "the teachers listed; by default the published LLM2Vec of the backbone, else echo."
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Set the paper's settings of generate, embed and train too.")
    ] = False,
    path: ParamsOption = PARAMS_FILE,
) -> None:
    """Switch the params file to a backbone and its teacher. Comments and everything else stay."""
    from pipeline.cli.presets import presets, switch, teachers

    if name is not None:
        changes = switch(path, name, memory, teacher, paper=paper)
        print("\n".join(changes) or f"{path} has these params already")
        return
    for known, preset in presets().items():
        size = f"{preset.sizes.parameters() / 1e9:.1f}B"
        pin = preset.backbone.revision or "not pinned"
        rate = "" if preset.published else " (a guess)"
        print(
            f"{known:<14} {size:>5}  {preset.backbone.name:<36} {pin[:12]:<12}  "
            f"teacher: {preset.teacher_name:<9}  rate {preset.learning_rate:g}{rate}"
        )
    print("rate: train.learning_rate of the paper's random start; set with --paper, or where train.warm_start is off")
    print("--teacher echo: the backbone's echo reading, not trained")
    print("--teacher trained: an LLM2Vec of the backbone, trained here")
    for known, other in teachers().items():
        print(f"--teacher {known}: {other.name}")
