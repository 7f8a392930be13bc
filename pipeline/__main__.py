"""The command line for people: `python -m pipeline COMMAND`. The stages have their own, which DVC calls."""

import typer

from pipeline.cli import exchange, look, setup, use
from pipeline.cli.options import printing_errors
from pipeline.cli.preview import try_
from pipeline.cli.readings import readings
from pipeline.cli.sweep import sweep
from pipeline.core.run import collect_garbage_rarely

app = typer.Typer(add_completion=False, no_args_is_help=True, help="LLM2Vec-Gen: look at a run, and use what it made.")
for command in (
    look.audit,
    look.inspect,
    look.compare,
    sweep,
    setup.params,
    setup.backbone,
    try_,
    readings,
    use.encode,
    use.search,
    use.decode,
    exchange.mix,
    exchange.rotate,
    exchange.import_official,
    exchange.export_official,
    exchange.export_st,
    exchange.export_merged,
    exchange.push,
):
    # A keyword of Python has an underscore behind it.
    app.command(command.__name__.strip("_").replace("_", "-"))(printing_errors(command))

if __name__ == "__main__":
    collect_garbage_rarely()
    app(prog_name="python -m pipeline")
