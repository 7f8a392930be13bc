"""The command line for people: `python -m pipeline COMMAND`. The stages have their own, which DVC calls."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.params import PARAMS_FILE
from pipeline.runtime import user_errors

if TYPE_CHECKING:
    from pipeline.audit import AuditReport
    from pipeline.backbone import DType
    from pipeline.encoder.inference import Encoder

app = typer.Typer(add_completion=False, no_args_is_help=True, help="LLM2Vec-Gen: look at a run, and use what it made.")

ModelOption = Annotated[Path, typer.Option("--model", help="An encoder folder, as train writes it.")]
ParamsOption = Annotated[Path, typer.Option("--params", help="The params file.")]


@app.command()
def audit(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False) -> None:
    """Verify every artifact: hashes, schemas, ids, models, dvc.lock. Exits with 1 on any finding."""
    from pipeline.audit import audit as run_audit

    with user_errors():
        report = run_audit()
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_audit(report)
    sys.exit(bool(report.findings))


def _print_audit(report: "AuditReport") -> None:
    for finding in report.findings:
        print(finding.line())
    for name in report.not_made:
        print(f"{name}: not made yet", file=sys.stderr)
    if report.findings:
        print(f"{len(report.findings)} findings", file=sys.stderr)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("artifact", "rows", "files", "bytes", "counts")
    for item in report.verified:
        rows = f"{item.rows:,}" if item.rows else ""
        table.add_row(item.artifact, rows, str(item.files), f"{item.bytes:,}", item.note)
    Console().print(table)
    locked = "no dvc.lock" if report.locked is None else f"{report.locked} outs agree with dvc.lock"
    print(f"no findings in {len(report.verified)} artifacts, {locked}")


@app.command()
def inspect(
    stage: Annotated[str, typer.Argument(help="collect, generate, embed, train, evaluate, probe or report.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many rows.")] = 5,
    row: Annotated[
        str | None, typer.Option("--id", help="An id, or its beginning: that row through all stages.")
    ] = None,
) -> None:
    """Show what a stage counted, made and failed at, or one row through all stages."""
    from rich.console import Console

    from pipeline.inspection import check_stage, counts, failures, show, trace

    with user_errors():
        check_stage(stage)
        tables = [trace(row)] if row is not None else [counts(stage), show(stage, n), failures(stage, n)]
        for table in tables:
            if table is not None:
                Console().print(table)


@app.command()
def params(path: ParamsOption = PARAMS_FILE) -> None:
    """Check the whole params file, and say what each stage will run, on what, with how much memory."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.plan import load_all, make_plan

    with user_errors():
        plan = make_plan(load_all(path))
        table = Table("stage", "what", "on what", show_lines=True)
        for line in plan.lines:
            table.add_row(*map(escape, line))
        Console().print(table)
        print("Estimates are upper bounds for rows of full length; their formulas: pipeline/training/memory.py.")
        for remark in plan.remarks:
            print(f"note: {remark}")


@app.command()
def backbone(
    name: Annotated[str | None, typer.Argument(help="A preset; without one, they are listed.")] = None,
    memory: Annotated[int, typer.Option(help="GPU memory in GB that the micro-batch is sized for: 24 or 80.")] = 80,
    path: ParamsOption = PARAMS_FILE,
) -> None:
    """Switch the params file to a backbone of the paper. Comments and all else stay as they are."""
    from pipeline.presets import presets, switch

    with user_errors():
        if name is not None:
            changes = switch(path, name, memory)
            print("\n".join(changes) or f"{path} has these params already")
            return
        for known, preset in presets().items():
            size = f"{preset.shape.parameters() / 1e9:.1f}B"
            pin = preset.backbone.revision or "not pinned"
            print(f"{known:<14} {size:>5}  {preset.backbone.name:<36} {pin[:12]}  rate {preset.learning_rate:g}")


@app.command()
def encode(
    model: ModelOption,
    source: Annotated[Path, typer.Option("--input", help="Texts: .txt (one a line), .jsonl, .csv or .parquet.")],
    output: Annotated[Path, typer.Option("--output", help="Embeddings: .npy or .parquet.")],
    prompt: Annotated[str, typer.Option(help="Instruction put before each text.")] = "",
    column: Annotated[str | None, typer.Option(help="Column of the texts.  [default: text]")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; by default chosen by the device.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
) -> None:
    """Embed the texts of a file."""
    with user_errors():
        from pipeline.encoding import check_output, read_texts, write_embeddings

        check_output(output)
        texts = read_texts(source, column)
        embeddings = _load(model, dtype).encode(
            texts, instruction=prompt, batch_tokens=batch_tokens, show_progress=True
        )
        write_embeddings(output, texts, embeddings)
        print(f"{len(texts)} embeddings of {embeddings.shape[1]} dimensions -> {output}")


@app.command()
def decode(
    model: ModelOption,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or several texts.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
) -> None:
    """Print the answer that the embedding of each text holds."""
    with user_errors():
        from pipeline.queries import normalize_text

        encoder = _load(model, dtype)
        from pipeline.lens import decode as run_decode

        for answer in run_decode(encoder, [normalize_text(text) for text in texts], max_new_tokens=max_new_tokens):
            print(answer)


def _load(model: Path, dtype: str) -> "Encoder":
    from typing import cast, get_args

    from pipeline.backbone import DType, best_device
    from pipeline.errors import ParamsError

    if dtype not in get_args(DType):
        raise ParamsError(f"--dtype {dtype}: known are {', '.join(get_args(DType))}")
    from pipeline.encoder.inference import Encoder

    return Encoder.load(model, device=best_device(), dtype=cast("DType", dtype))


if __name__ == "__main__":
    app(prog_name="python -m pipeline")
