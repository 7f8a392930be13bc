"""The command line for people: `python -m pipeline COMMAND`. The stages have their own, which DVC calls."""

import json
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.config import PARAMS_FILE
from pipeline.core.run import user_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.audit import AuditReport
    from pipeline.backbone.loading import DType
    from pipeline.core.target_transform import Space
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder
    from pipeline.lens.decoding import EngineName as DecodingEngine

app = typer.Typer(add_completion=False, no_args_is_help=True, help="LLM2Vec-Gen: look at a run, and use what it made.")

ModelOption = Annotated[Path, typer.Option("--model", help="An encoder folder, as train writes it.")]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="Where the backbone lies, in place of the recorded folder or hub name.")
]
OtherOption = Annotated[
    bool, typer.Option("--allow-other-backbone", help="Take a backbone that the encoder was not trained on too.")
]
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
    stage: Annotated[str, typer.Argument(help="collect, generate, teach, embed, train, evaluate, probe or report.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many rows.")] = 5,
    row: Annotated[
        str | None, typer.Option("--id", help="An id, or its beginning: that row through all stages.")
    ] = None,
) -> None:
    """Show what a stage counted, made and failed at, or one row through all stages."""
    from rich.console import Console

    from pipeline.audit.inspect import check_stage, counts, failures, show, trace

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

    from pipeline.cli.plan import load_all, make_plan

    with user_errors():
        plan = make_plan(load_all(path))
        table = Table("stage", "what", "on what", show_lines=True)
        for line in plan.lines:
            table.add_row(*map(escape, line))
        Console().print(table)
        print("Estimates are upper bounds for rows of full length; their formulas: pipeline/optim/memory.py.")
        for remark in plan.remarks:
            print(f"note: {remark}")


@app.command()
def backbone(
    name: Annotated[str | None, typer.Argument(help="A preset; without one, they are listed.")] = None,
    memory: Annotated[int, typer.Option(help="GPU memory in GB that the micro-batch is sized for: 24 or 80.")] = 80,
    path: ParamsOption = PARAMS_FILE,
) -> None:
    """Switch the params file to a backbone and its teacher. Comments and all else stay as they are."""
    from pipeline.cli.presets import presets, switch

    with user_errors():
        if name is not None:
            changes = switch(path, name, memory)
            print("\n".join(changes) or f"{path} has these params already")
            return
        for known, preset in presets().items():
            size = f"{preset.shape.parameters() / 1e9:.1f}B"
            pin = preset.backbone.revision or "not pinned"
            teacher, rate = ("published", "") if preset.published else ("trained here", " (a guess)")
            print(
                f"{known:<14} {size:>5}  {preset.backbone.name:<36} {pin[:12]:<12}  "
                f"teacher: {teacher:<12}  rate {preset.learning_rate:g}{rate}"
            )


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
    space: Annotated[
        str, typer.Option(help="trained, or teacher: behind embed.transform, back in the teacher's space.")
    ] = "trained",
    backbone: BackboneOption = None,
    other: OtherOption = False,
) -> None:
    """Embed the texts of a file, of any size. Killed and run again, it goes on where it was."""
    with user_errors():
        from pipeline.core.text_files import open_texts
        from pipeline.encoder.encode_file import check_output, encode_file

        check_output(output, source)
        wanted = _space(space)
        texts = open_texts(source, column)
        encoder = _load(model, dtype, backbone, other)
        done = encode_file(encoder, texts, output, instruction=prompt, batch_tokens=batch_tokens, space=wanted)
        kept = f" ({done.kept} of them from the run before)" if done.kept else ""
        print(f"{done.rows} embeddings of {done.width} dimensions -> {output}{kept}")
        if done.truncated:
            print(f"note: {encoder.config.cut(done.truncated, done.rows - done.kept)}")


@app.command()
def search(
    model: ModelOption,
    corpus: Annotated[
        Path,
        typer.Option(help="Passages: .txt, .jsonl, .csv or .parquet; what encode wrote is not embedded again."),
    ],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many passages.")] = 5,
    prompt: Annotated[
        str | None, typer.Option(help="Instruction put before the query.  [default: as in the evaluation of retrieval]")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Instruction put before each passage.  [default: as in the evaluation]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the passages.  [default: text]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer decoded.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
    backbone: BackboneOption = None,
    other: OtherOption = False,
) -> None:
    """Show the passages nearest to a query, and the answer that the query's embedding holds."""
    with user_errors():
        from pipeline.cli.search import search as run_search
        from pipeline.cli.search import table
        from pipeline.core.text import normalize_text, visible
        from pipeline.core.text_files import open_texts

        passages = open_texts(corpus, column, "--corpus")
        wanted = normalize_text(query)
        encoder = _load(model, dtype, backbone, other)
        prompts = _retrieval_prompts(prompt, document_prompt)
        hits = run_search(
            encoder,
            passages,
            wanted,
            count=count,
            instruction=prompts["query"],
            document_instruction=prompts["document"],
        )
        from rich.console import Console

        from pipeline.lens import decode as run_decode

        Console().print(table(hits))
        answers = run_decode(encoder, [wanted], max_new_tokens=max_new_tokens, instruction=prompts["query"])
        print(f"The query's embedding decodes to: {visible(answers[0])}")


def _retrieval_prompts(query: str | None, document: str | None) -> dict[str, str]:
    """Instructions by name; None: that of the evaluation of retrieval."""
    from pipeline.tasks.instructions import load_instructions

    known = load_instructions()
    return {
        "query": known.choose("", "Retrieval", "query") if query is None else query,
        "document": known.choose("", "Retrieval", "document") if document is None else document,
    }


@app.command("import-official")
def import_official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint of the authors: a folder, or a hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The encoder folder to write; a new one.")],
    backbone: Annotated[str | None, typer.Option(help="Name or folder to use in place of the recorded one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a checkpoint on the hub.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest input in tokens, new ones included; 512 by default, as theirs.")
    ] = None,
) -> None:
    """Make an encoder of a checkpoint of the paper's authors. Nothing in it is run."""
    with user_errors():
        from pipeline.export.official.import_ import import_official as run_import

        remarks = run_import(source, out, backbone=backbone, revision=revision, max_length=max_length)
        print("\n".join([f"{source} -> {out}", *(f"note: {remark}" for remark in remarks)]))


@app.command("export-official")
def export_official(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An encoder folder, as train writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a new one.")],
    backbone: Annotated[str | None, typer.Option(help="Name or folder to use in place of the recorded one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="That their package computes in: bfloat16, float16 or float32.")
    ] = "float32",
) -> None:
    """Write an encoder as a checkpoint that the package of the paper's authors reads."""
    with user_errors():
        chosen = _dtype(dtype)
        from pipeline.export.official.export import export_official as run_export

        remarks = run_export(model, out, backbone=backbone, dtype=chosen)
        print("\n".join([f"{model} -> {out}", *(f"note: {remark}" for remark in remarks)]))


@app.command("export-st")
def export_st(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An encoder folder, as train writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a new one.")],
    results: Annotated[Path | None, typer.Option(help="Folder of results: scores for the model card.")] = None,
) -> None:
    """Write an encoder as a sentence-transformers folder to give away, with its scores in the model card."""
    with user_errors():
        from pipeline.export.publish import publish

        shown = publish(model, out, results)
        print("\n".join([f"{model} -> {out}", *(f"scores of {name}" for name in shown)]))


@app.command("export-merged")
def export_merged(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An encoder folder, as train writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    backbone: Annotated[str | None, typer.Option(help="Name or folder in place of the recorded backbone.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights: bfloat16, float16 or float32.")] = "float32",
) -> None:
    """Write a standard checkpoint for engines that run no code of ours: vLLM, plain sentence-transformers."""
    with user_errors():
        chosen = _dtype(dtype)
        from pipeline.encoder.folder.st_files import st_prompts
        from pipeline.export.merged.export import export_merged as run_export
        from pipeline.export.merged.export import usage
        from pipeline.tasks.instructions import load_instructions

        prompts = st_prompts(load_instructions())
        merged = run_export(model, out, prompts=prompts, dtype=chosen, backbone=backbone)
        kind = "its" if chosen == "float32" else f"with weights rounded to {chosen}, its"
        print(f"{out}: {kind} embeddings in float32 are the encoder's up to {merged.difference:.1g} of their length")
        print("\n".join(usage(out, merged.shape)))


@app.command()
def decode(
    model: ModelOption,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT...]", help="One or several texts.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="Texts: .txt (one a line), .jsonl, .csv or .parquet.")
    ] = None,
    soft_prompts: Annotated[
        Path | None, typer.Option(help="Stored soft prompts [N, n, d]: .npy, .safetensors or .parquet.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Parquet file for all that can be read; else the answers are printed.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Page of the first rows of --output.")] = None,
    prompt: Annotated[str, typer.Option(help="Instruction put before each text.")] = "",
    column: Annotated[str | None, typer.Option(help="Column of the texts.  [default: text]")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of the real responses, to compare with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    engine: Annotated[str, typer.Option(help="That decodes: transformers, or vllm for many texts.")] = "transformers",
    vocabulary: Annotated[int, typer.Option(min=0, help="Words of each compression token in --output.")] = 8,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Where to find the nearest texts for --output: a data folder, or what encode wrote."),
    ] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many of the nearest.")] = 5,
    faithfulness: Annotated[
        bool,
        typer.Option("--faithfulness", help="Cosines of the decoded texts in --output, by embed.teacher of --params."),
    ] = False,
    params: ParamsOption = PARAMS_FILE,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
    backbone: BackboneOption = None,
    other: OtherOption = False,
) -> None:
    """Print the answer that the embedding of each text holds, or write all that can be read of it to a file."""
    with user_errors(), ExitStack() as held:
        from pipeline.lens.sources import check_options, open_source

        check_options(texts, source, soft_prompts, output, html, response_column, corpus, faithfulness)
        chosen = _decoding_engine(engine)
        rows = open_source(
            texts, source, soft_prompts, hidden=lambda: _hidden(model), column=column, response_column=response_column
        )
        teacher = held.enter_context(_teacher(params, model)) if faithfulness else None
        encoder = _load(model, dtype, backbone, other)
        from pipeline.lens.batch import Request, print_answers, read_to_files

        request = Request(rows, prompt, max_new_tokens, chosen, backbone, vocabulary, corpus, count)
        if output is None:
            print_answers(encoder, request)
        else:
            print("\n".join(read_to_files(encoder, request, output, html, teacher)))


def _decoding_engine(name: str) -> "DecodingEngine":
    from typing import cast, get_args

    from pipeline.core.errors import ParamsError
    from pipeline.generate.engines import prepare_environment
    from pipeline.lens.decoding import EngineName

    if name not in get_args(EngineName):
        raise ParamsError(f"--engine {name}: known are {', '.join(get_args(EngineName))}")
    chosen = cast("DecodingEngine", name)
    prepare_environment(chosen)
    return chosen


def _hidden(model: Path) -> int:
    from pipeline.encoder.folder.read import read_config

    return read_config(model).hidden


@contextmanager
def _teacher(params: Path, model: Path) -> "Iterator[Teacher]":
    """The teacher as it made the targets of the encoder `model`, by the params file."""
    from pipeline.core.config import load
    from pipeline.embed.teachers.pool import open_teacher
    from pipeline.embed.teachers.transformed import in_trained_space
    from pipeline.evaluate.build import TeacherInputs

    inputs = load(params, TeacherInputs)
    with open_teacher(inputs.embed.teacher, inputs.backbone, 1) as teacher:
        yield in_trained_space(teacher, model)


def _load(model: Path, dtype: str, backbone: str | None = None, other: bool = False) -> "Encoder":
    chosen = _dtype(dtype)
    from pipeline.backbone.device import best_device
    from pipeline.encoder.inference import Encoder

    return Encoder.load(model, device=best_device(), dtype=chosen, backbone=backbone, allow_other_backbone=other)


def _space(name: str) -> "Space":
    from typing import cast, get_args

    from pipeline.core.errors import ParamsError
    from pipeline.core.target_transform import Space

    if name not in get_args(Space):
        raise ParamsError(f"--space {name}: known are {', '.join(get_args(Space))}")
    return cast("Space", name)


def _dtype(name: str) -> "DType":
    from typing import cast, get_args

    from pipeline.backbone.loading import DType
    from pipeline.core.errors import ParamsError

    if name not in get_args(DType):
        raise ParamsError(f"--dtype {name}: known are {', '.join(get_args(DType))}")
    return cast("DType", name)


if __name__ == "__main__":
    app(prog_name="python -m pipeline")
