"""Texts that anyone may have written, made safe to show: a terminal or a page must not obey them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def visible(text: str) -> str:
    """Text without control characters, which neither a page nor a terminal should be sent."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def templates(folder: Path, *, autoescape: bool = True) -> "Environment":
    """The templates of a folder, with the filter `visible`; what they name and is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    return environment
