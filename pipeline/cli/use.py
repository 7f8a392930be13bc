"""Commands that use an encoder: encode, search, decode."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    BackboneOption,
    CenterOption,
    ColumnOption,
    DTypeOption,
    InputOption,
    ModelOption,
    OptionalInputOption,
    OtherBackboneOption,
    ParamsOption,
    PromptOption,
    RemoteCodeOption,
    TidyOption,
    load_encoder,
    one_of,
    print_table,
)
from pipeline.core.config import PARAMS_FILE
from pipeline.core.errors import ParamsError, nested_in

if TYPE_CHECKING:
    from pipeline.core.readers import File
    from pipeline.embed.teachers.base import Teacher
    from pipeline.lens.sources import Source


def encode(
    model: ModelOption,
    source: InputOption,
    output: Annotated[Path, typer.Option("--output", help="Embeddings: .npy or .parquet; replaces the file.")],
    prompt: PromptOption = "",
    column: ColumnOption = None,
    tidy: TidyOption = False,
    keep: Annotated[
        str | None, typer.Option(help="Columns of the input to keep in .parquet: id,url or all; by default the text.")
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first dimensions, scaled to length 1.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 (256 steps over the texts' range) or binary (signs, eight in a byte).")
    ] = None,
    center: CenterOption = None,
    input_format: Annotated[
        str, typer.Option("--format", help="Of standard input: txt, jsonl, csv, parquet, jsonl.gz, ...")
    ] = "txt",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; by default chosen by the device.")
    ] = None,
    dtype: DTypeOption = "float32",
    space: Annotated[
        str, typer.Option(help="trained, or teacher: behind embed.transform, back in the teacher's space.")
    ] = "trained",
    backbone: BackboneOption = None,
    allow_other_backbone: OtherBackboneOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Embed the texts of a file, of any size. A killed run continues where it was."""
    from pipeline.core.readers import open_texts
    from pipeline.core.target_transform import Space
    from pipeline.encoder.encode_file import check_output, encode_file, kept_columns
    from pipeline.encoder.storage import Precision, Storage

    piped = source == Path("-")
    check_output(output, None if piped else source, keeps=keep is not None)
    chosen = one_of(Space, space, "space")
    storage = Storage(truncate_dim, one_of(Precision, quantize, "quantize") if quantize else None)
    with nested_in(names={"path": "source", "format": "input_format"}), ExitStack() as stack:
        found, identity = _standard_input(stack, input_format) if piped else (source, None)
        texts = open_texts(found, column, tidy=tidy, identity=identity)
        kept = None if keep is None else kept_columns(texts, keep)
        encoder = load_encoder(model, dtype, backbone, allow_other_backbone, trust_remote_code)
        done = encode_file(
            encoder,
            texts,
            output,
            instruction=prompt,
            batch_tokens=batch_tokens,
            space=chosen,
            kept=kept,
            storage=storage,
            center=center,
        )
    reused = f" ({done.kept} of them from the run before)" if done.kept else ""
    values = "bytes (eight dimensions each)" if quantize == "binary" else "dimensions"
    print(f"{done.rows} embeddings of {done.width} {values} -> {output}{reused}")
    if done.truncated:
        print(f"note: {encoder.config.truncation_note(done.truncated, done.rows - done.kept)}")


def _standard_input(stack: ExitStack, ending: str) -> "tuple[File, str]":
    """Standard input as a file until `stack` closes, and what names it in unfinished work."""
    from pipeline.core.readers import spooled
    from pipeline.core.run import work_dir

    file, digest = stack.enter_context(spooled(sys.stdin.buffer, ending, work_dir("encode")))
    return file, f"standard input {digest}"


def search(
    model: ModelOption,
    corpus: Annotated[
        Path,
        typer.Option(help="Passages, in files as encode reads them; what encode wrote is not embedded again."),
    ],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many passages.")] = 5,
    prompt: Annotated[
        str | None, typer.Option(help="Instruction put before the query; by default as in the evaluation of retrieval.")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Instruction put before each passage; by default as in the evaluation.")
    ] = None,
    center: CenterOption = None,
    column: Annotated[str | None, typer.Option(help="Column of the passages; by default text.")] = None,
    tidy: TidyOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer decoded.")] = 64,
    dtype: DTypeOption = "float32",
    backbone: BackboneOption = None,
    allow_other_backbone: OtherBackboneOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Show the passages nearest to a query, and the answer that the query's embedding holds."""
    from pipeline.cli.search import search as run_search
    from pipeline.cli.search import table
    from pipeline.core.readers import open_texts
    from pipeline.core.text import normalize_text, visible
    from pipeline.tasks.instructions import load_instructions

    text, known = normalize_text(query) if tidy else query, load_instructions()
    instruction = known.choose("", "Retrieval", "query") if prompt is None else prompt
    document = known.choose("", "Retrieval", "document") if document_prompt is None else document_prompt
    with nested_in(names={"path": "corpus"}):
        passages = open_texts(corpus, column, tidy=tidy)
        encoder = load_encoder(model, dtype, backbone, allow_other_backbone, trust_remote_code)
        hits = run_search(
            encoder,
            passages,
            text,
            count=count,
            instruction=instruction,
            document_instruction=document,
            center=center,
        )
    print_table(table(hits))
    from pipeline.lens import decode as run_decode

    [answer] = run_decode(encoder, [text], max_new_tokens=max_new_tokens, instruction=instruction)
    print(f"The query's embedding decodes to: {visible(answer)}")


def decode(
    model: ModelOption,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT...]", help="One or several texts.")] = None,
    source: OptionalInputOption = None,
    soft_prompts: Annotated[
        Path | None, typer.Option(help="Stored soft prompts [N, n, d]: .npy, .safetensors or .parquet.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Parquet file for all that can be read; else the answers are printed.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Page of the first rows of --output.")] = None,
    prompt: PromptOption = "",
    column: ColumnOption = None,
    tidy: TidyOption = False,
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
    dtype: DTypeOption = "float32",
    backbone: BackboneOption = None,
    allow_other_backbone: OtherBackboneOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Print the answer that the embedding of each text holds, or write all that can be read of it to a file."""
    from pipeline.generate.engines.registry import prepare_environment
    from pipeline.lens.decoding import EngineName

    given = {"TEXT": texts, "--input": source, "--soft-prompts": soft_prompts}
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        raise ParamsError(f"decode: {' and '.join(named) or 'nothing'} given: give one of {', '.join(given)}")
    _check_outputs({"output": output, "html": html}, [source, soft_prompts, corpus])
    for argument, value in (("html", html), ("corpus", corpus), ("faithfulness", faithfulness)):
        if value and output is None:
            raise ParamsError("needs --output too, into whose rows it goes", argument=argument)
    if response_column is not None and source is None:
        raise ParamsError("needs an --input with columns (.jsonl, .csv or .parquet)", argument="response_column")
    chosen = one_of(EngineName, engine, "engine")
    prepare_environment(chosen)
    from pipeline.encoder.folder.locate import encoder_folder

    model = encoder_folder(model)
    with nested_in(names={"path": "source", "teacher": "embed.teacher"}), ExitStack() as stack:
        rows = _source(model, texts or [], source, soft_prompts, column, response_column, tidy)
        teacher = _open_teacher(stack, params, model) if faithfulness else None
        encoder = load_encoder(model, dtype, backbone, allow_other_backbone, trust_remote_code)
        from pipeline.lens.batch import Request, print_answers, read_to_files

        request = Request(rows, prompt, max_new_tokens, chosen, backbone, vocabulary, corpus, count, trust_remote_code)
        if output is None:
            print_answers(encoder, request)
        else:
            print("\n".join(read_to_files(encoder, request, output, html, teacher)))


def _check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path | None]) -> None:
    """Check the names of decode's --output and --html; none may be a file that is read."""
    from pipeline.core.readers import check_not_read

    suffixes = {"output": ".parquet", "html": ".html"}
    for argument, path in outputs.items():
        if path is None:
            continue
        if path.suffix != suffixes[argument]:
            raise ParamsError(f"{path} must end in {suffixes[argument]}", argument=argument)
        with nested_in(names={"output": argument}):
            for read in inputs:
                check_not_read(path, read)


def _source(
    model: Path,
    texts: Sequence[str],
    source: Path | None,
    soft_prompts: Path | None,
    column: str | None,
    response_column: str | None,
    tidy: bool,
) -> "Source":
    """The rows that decode reads."""
    from pipeline.core.readers import open_texts
    from pipeline.encoder.folder.read import read_config
    from pipeline.lens.sources import from_file, from_soft_prompts, from_texts, open_soft_prompts

    if soft_prompts is not None:
        return from_soft_prompts(open_soft_prompts(soft_prompts, read_config(model).hidden))
    if source is None:
        return from_texts(texts, tidy=tidy)
    file = open_texts(source, column, tidy=tidy)
    with nested_in(names={"column": "response_column", "responses": "response_column"}):
        return from_file(file, open_texts(source, response_column, tidy=tidy) if response_column else None)


def _open_teacher(stack: ExitStack, params: Path, model: Path) -> "Teacher":
    """The teacher that made the targets of the encoder `model`, by the params file; `stack` closes it."""
    from pipeline.core.config import load
    from pipeline.embed.teachers.pool import open_teacher
    from pipeline.embed.teachers.transformed import in_trained_space
    from pipeline.evaluate.build import TeacherInputs

    inputs = load(params, TeacherInputs)
    teacher = stack.enter_context(open_teacher(inputs.embed.teacher, inputs.backbone, 1))
    return in_trained_space(teacher, model)
