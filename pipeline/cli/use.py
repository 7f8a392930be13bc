"""Commands that use an encoder: encode, search, decode."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    BackboneOption,
    ColumnOption,
    DTypeOption,
    InputOption,
    ModelOption,
    OptionalInputOption,
    OtherBackboneOption,
    ParamsOption,
    PromptOption,
    load_encoder,
    one_of,
)
from pipeline.core.config import PARAMS_FILE
from pipeline.core.errors import nested_in

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher


def encode(
    model: ModelOption,
    source: InputOption,
    output: Annotated[Path, typer.Option("--output", help="Embeddings: .npy or .parquet.")],
    prompt: PromptOption = "",
    column: ColumnOption = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; by default chosen by the device.")
    ] = None,
    dtype: DTypeOption = "float32",
    space: Annotated[
        str, typer.Option(help="trained, or teacher: behind embed.transform, back in the teacher's space.")
    ] = "trained",
    backbone: BackboneOption = None,
    allow_other_backbone: OtherBackboneOption = False,
) -> None:
    """Embed the texts of a file, of any size. A killed run continues where it was."""
    from pipeline.core.target_transform import Space
    from pipeline.core.text_files import open_texts
    from pipeline.encoder.encode_file import check_output, encode_file

    check_output(output, source)
    chosen = one_of(Space, space, "space")
    texts = open_texts(source, column)
    encoder = load_encoder(model, dtype, backbone, allow_other_backbone)
    done = encode_file(encoder, texts, output, instruction=prompt, batch_tokens=batch_tokens, space=chosen)
    kept = f" ({done.kept} of them from the run before)" if done.kept else ""
    print(f"{done.rows} embeddings of {done.width} dimensions -> {output}{kept}")
    if done.truncated:
        print(f"note: {encoder.config.truncation_note(done.truncated, done.rows - done.kept)}")


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
    dtype: DTypeOption = "float32",
    backbone: BackboneOption = None,
    allow_other_backbone: OtherBackboneOption = False,
) -> None:
    """Show the passages nearest to a query, and the answer that the query's embedding holds."""
    from rich.console import Console

    from pipeline.cli.search import search as run_search
    from pipeline.cli.search import table
    from pipeline.core.text import normalize_text, visible
    from pipeline.core.text_files import open_texts
    from pipeline.tasks.instructions import load_instructions

    passages = open_texts(corpus, column, "--corpus")
    text = normalize_text(query)
    encoder = load_encoder(model, dtype, backbone, allow_other_backbone)
    known = load_instructions()
    instruction = known.choose("", "Retrieval", "query") if prompt is None else prompt
    document = known.choose("", "Retrieval", "document") if document_prompt is None else document_prompt
    hits = run_search(encoder, passages, text, count=count, instruction=instruction, document_instruction=document)
    Console().print(table(hits))
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
) -> None:
    """Print the answer that the embedding of each text holds, or write all that can be read of it to a file."""
    from pipeline.encoder.folder.read import read_config
    from pipeline.generate.engines.registry import prepare_environment
    from pipeline.lens.decoding import EngineName
    from pipeline.lens.sources import check_options, open_source

    check_options(texts, source, soft_prompts, output, html, response_column, corpus, faithfulness)
    chosen = one_of(EngineName, engine, "engine")
    prepare_environment(chosen)
    rows = open_source(
        texts,
        source,
        soft_prompts,
        hidden=lambda: read_config(model).hidden,
        column=column,
        response_column=response_column,
    )
    with ExitStack() as stack:
        teacher = _open_teacher(stack, params, model) if faithfulness else None
        encoder = load_encoder(model, dtype, backbone, allow_other_backbone)
        from pipeline.lens.batch import Request, print_answers, read_to_files

        request = Request(rows, prompt, max_new_tokens, chosen, backbone, vocabulary, corpus, count)
        if output is None:
            print_answers(encoder, request)
        else:
            with nested_in(names={"teacher": "embed.teacher"}):
                print("\n".join(read_to_files(encoder, request, output, html, teacher)))


def _open_teacher(stack: ExitStack, params: Path, model: Path) -> "Teacher":
    """The teacher that made the targets of the encoder `model`, by the params file; `stack` closes it."""
    from pipeline.core.config import load
    from pipeline.embed.teachers.pool import open_teacher
    from pipeline.embed.teachers.transformed import in_trained_space
    from pipeline.evaluate.build import TeacherInputs

    inputs = load(params, TeacherInputs)
    teacher = stack.enter_context(open_teacher(inputs.embed.teacher, inputs.backbone, 1))
    return in_trained_space(teacher, model)
