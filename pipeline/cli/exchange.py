"""Commands that make another folder of one, and give it away: mix, rotate, push, import-official, and others."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    DTYPES,
    BackboneOption,
    ColumnOption,
    DTypeOption,
    ModelArgument,
    PromptOption,
    RemoteCodeOption,
    load_encoder,
    one_of,
)
from pipeline.core.errors import nested_in

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a new one.")]
RecordedOption = Annotated[str | None, typer.Option(help="Name or folder to use in place of the recorded one.")]


def import_official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint of the authors: a folder, or a hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The encoder folder to write; a new one.")],
    backbone: RecordedOption = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a checkpoint on the hub.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest input in tokens, new ones included; 512 by default, as theirs.")
    ] = None,
) -> None:
    """Make an encoder of a checkpoint of the paper's authors. Nothing in it is run."""
    from pipeline.export.official.import_ import import_official

    _print(source, out, import_official(source, out, backbone=backbone, revision=revision, max_length=max_length))


def mix(
    model: ModelArgument,
    response_share: Annotated[float, typer.Option(help="Of the predicted response, above 0; 1 is the paper's.")],
    response_form: Annotated[
        str | None, typer.Option(help="beside or added (summed in one space); by default the encoder's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write; by default MODEL itself.")] = None,
) -> None:
    """Change how much of an embedding is the predicted response; the rest is the encoder's own reading of the text."""
    from pipeline.encoder.folder.config import ResponseForm
    from pipeline.encoder.folder.mix import mix as mix_encoder
    from pipeline.encoder.folder.read import read_config

    out = output or model
    rotated = read_config(model).rotated_width is not None
    form = None if response_form is None else one_of(ResponseForm, response_form, "response_form")
    config = mix_encoder(model, response_share, out, form)
    print(f"{model} -> {out}: response share {response_share}, embeddings of {config.embedding_width} dimensions")
    if rotated:
        print("note: the rotation was of the former embeddings and is gone; rotate again")
    if output is None:
        joined = "" if form is None else f" and train.response_form to {form}"
        print(
            f"note: set train.response_share to {response_share}{joined}, or `dvc repro` makes the former encoder again"
        )


def rotate(
    model: ModelArgument,
    texts: Annotated[
        Path, typer.Option("--texts", help="Texts like those to embed, in files as encode reads them; some thousands.")
    ],
    output: Annotated[Path | None, typer.Option(help="The folder to write; by default MODEL itself.")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Keep the first ones only; by default all.")] = None,
    prompt: PromptOption = "",
    column: ColumnOption = None,
    dtype: DTypeOption = "float32",
    backbone: BackboneOption = None,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Turn embeddings so that their first dimensions hold most of them; cosines stay as they are."""
    from pipeline.core.readers import open_texts
    from pipeline.encoder.folder.rotate import rotate as rotate_encoder

    out = output or model
    with nested_in(names={"path": "texts"}):
        read = open_texts(texts, column)
        encoder = load_encoder(model, dtype, backbone, False, trust_remote_code)
        found = rotate_encoder(model, encoder, read, out, instruction=prompt, dimensions=dimensions)
    width = len(found.shares)
    print(f"{model} -> {out}: embeddings of {width} dimensions, {encoder.width} before, rotated on {read.rows} texts")
    counts = sorted({max(1, width // part) for part in (8, 4, 2)} | {width})
    held = ", ".join(f"{count} hold {found.leading(count):.1%}" for count in counts)
    print(f"of their squared length the first {held}")
    if read.rows < width:
        print(f"note: {read.rows} texts are fewer than the dimensions: the order of the last ones is arbitrary")
    if output is None:
        print("note: the next `dvc repro` makes the former encoder again; embed.transform rotates in the pipeline")


def export_official(
    model: ModelArgument,
    out: OutArgument,
    backbone: RecordedOption = None,
    dtype: Annotated[str, typer.Option(help=f"That their package computes in: {DTYPES}")] = "float32",
) -> None:
    """Write an encoder as a checkpoint that the package of the paper's authors reads."""
    from pipeline.backbone.loading import DType

    chosen = one_of(DType, dtype, "dtype")
    from pipeline.export.official.export import export_official

    _print(model, out, export_official(model, out, backbone=backbone, dtype=chosen))


def _print(source: str | Path, out: Path, notes: Iterable[str]) -> None:
    print("\n".join([f"{source} -> {out}", *(f"note: {note}" for note in notes)]))


def export_st(
    model: ModelArgument,
    out: OutArgument,
    results: Annotated[Path | None, typer.Option(help="Folder of results: scores for the model card.")] = None,
) -> None:
    """Write an encoder as a sentence-transformers folder to give away, with its scores in the model card."""
    from pipeline.export.publish import publish

    scored = publish(model, out, results)
    print("\n".join([f"{model} -> {out}", *(f"scores of {name}" for name in scored)]))


def export_merged(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    backbone: Annotated[str | None, typer.Option(help="Name or folder in place of the recorded backbone.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the written weights: {DTYPES}")] = "float32",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Write a standard checkpoint for engines that run no code of ours: vLLM, plain sentence-transformers."""
    from pipeline.backbone.loading import DType

    chosen = one_of(DType, dtype, "dtype")
    from pipeline.encoder.folder.st_files import st_prompts
    from pipeline.export.merged.export import export_merged, usage
    from pipeline.tasks.instructions import load_instructions

    prompts = st_prompts(load_instructions())
    merged = export_merged(
        model, out, prompts=prompts, dtype=chosen, backbone=backbone, trust_remote_code=trust_remote_code
    )
    kind = "its" if chosen == "float32" else f"with weights rounded to {chosen}, its"
    print(f"{out}: {kind} embeddings in float32 are the encoder's up to {merged.difference:.1g} of their length")
    print("\n".join(usage(out, merged.layout)))


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An encoder, or data/queries, responses, targets.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the hub; it is made if it is not there.")],
    results: Annotated[Path | None, typer.Option(help="Folder of results: scores for the model card.")] = None,
    license: Annotated[str | None, typer.Option(help="The hub's name of a licence, for the card.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    branch: Annotated[str | None, typer.Option(help="To push to; main by default.")] = None,
) -> None:
    """Upload an encoder or a data set to the hub, with a card. The token is the hub's own (HF_TOKEN, hf auth login)."""
    from pipeline.export.hub import push

    print(push(folder, repository, results=results, license=license, private=private, branch=branch))
