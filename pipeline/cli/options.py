"""What the commands share: options, checks of their values, loading an encoder, errors for people."""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo

from pipeline.core.errors import ParamsError, nested_in
from pipeline.core.run import prepare_threads, user_errors

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.encoder.inference import Encoder

# Of a table where the output is no terminal.
WIDTH = 200
DTYPES = "bfloat16, float16 or float32."
_MODEL = "An encoder folder, as train writes it."
_TEXTS = "Texts: .txt (one a line), .jsonl, .csv or .parquet, also .gz or .zst; a folder or a pattern of such files."

ModelOption = Annotated[Path, typer.Option("--model", help=_MODEL)]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL)]
InputOption = Annotated[Path, typer.Option("--input", help=f"{_TEXTS} - is standard input.")]
OptionalInputOption = Annotated[Path | None, typer.Option("--input", help=_TEXTS)]
ColumnOption = Annotated[str | None, typer.Option(help="Column of the texts; by default text.")]
TidyOption = Annotated[
    bool, typer.Option("--tidy", help="Normalise texts as collect does: NFC, tidy spaces; by default nothing.")
]
PromptOption = Annotated[str, typer.Option(help="Instruction put before each text.")]
CenterOption = Annotated[
    str | None,
    typer.Option(
        help="Subtract a mean embedding: corpus, that of the texts themselves; or the file where encode --center "
        "corpus stored one."
    ),
]
DTypeOption = Annotated[str, typer.Option(help=DTYPES)]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="Where the backbone lies, in place of the recorded folder or hub name.")
]
OtherBackboneOption = Annotated[
    bool, typer.Option("--allow-other-backbone", help="Take a backbone that the encoder was not trained on too.")
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the backbone run code that comes with it.")
]
ParamsOption = Annotated[Path, typer.Option("--params", help="The params file.")]


def print_table(table: "Table") -> None:
    """Print a table as wide as the terminal, into a file or a pipe `WIDTH` wide: 80 columns would cut its cells."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    console.print(table)


def printing_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors as one line each; an error about an argument begins with the option.

    A component's argument is taken for the command's parameter of that name.
    """
    parameters = inspect.signature(command).parameters.values()
    options = {parameter.name: _written(parameter) for parameter in parameters}

    @wraps(command)
    def run(**arguments: Any) -> None:
        with user_errors(), nested_in(names=options):
            command(**arguments)

    return run


def _written(parameter: inspect.Parameter) -> str:
    """A parameter as the user writes it: `--max-length`, `MODEL`."""
    [info] = parameter.annotation.__metadata__
    if isinstance(info, ArgumentInfo):
        return info.metavar or parameter.name.upper()
    # The first name of an option stands where a default would, until typer reads the command.
    names = (info.default, *(info.param_decls or ()))
    long = [name for name in names if isinstance(name, str) and name.startswith("--")]
    return long[0] if long else f"--{parameter.name.replace('_', '-')}"


def one_of(kinds: Any, value: str, argument: str) -> Any:
    """`value` if the Literal `kinds` has it, else a ParamsError."""
    if value not in get_args(kinds):
        raise ParamsError(f"unknown value '{value}' (known: {', '.join(get_args(kinds))})", argument=argument)
    return value


def load_encoder(
    model: Path, dtype: str, backbone: str | None, allow_other_backbone: bool, trust_remote_code: bool
) -> "Encoder":
    """An encoder on the best device of this machine; see `read_encoder`."""
    prepare_threads()
    from pipeline.backbone.device import best_device
    from pipeline.backbone.loading import DType

    chosen = one_of(DType, dtype, "dtype")
    from pipeline.encoder.folder.locate import encoder_folder
    from pipeline.encoder.folder.read import read_encoder

    return read_encoder(
        encoder_folder(model),
        device=best_device(),
        dtype=chosen,
        backbone=backbone,
        allow_other_backbone=allow_other_backbone,
        trust_remote_code=trust_remote_code,
    )
