"""Texts of any origin: made safe to show, normalised, and named by a hash."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def visible(text: str) -> str:
    """Text without control characters, which neither a page nor a terminal should be sent."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def templates(*folders: Path, autoescape: bool = True) -> "Environment":
    """The templates of folders, with the filter `visible`; an undefined name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    return environment


def by_length(texts: Sequence[str], most_texts: int, most_characters: int) -> list[list[int]]:
    """Rows of `texts`, the longest first, in groups of at most so many texts and characters.

    A text of more characters is a group of its own.
    """
    groups: list[list[int]] = []
    characters = 0
    for row in sorted(range(len(texts)), key=lambda row: -len(texts[row])):
        if not groups or len(groups[-1]) >= most_texts or characters + len(texts[row]) > most_characters:
            groups.append([])
            characters = 0
        groups[-1].append(row)
        characters += len(texts[row])
    return groups


# Surrogates are no characters; tabs and line ends are whitespace, all other control characters are noise.
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_INNER_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")
_INDENT_SPACE = re.compile(r"[^\S\t]")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize_text(text: str) -> str:
    """The one form in which the pipeline sees a text: Unicode NFC with tidy whitespace, always encodable as UTF-8.

    Surrogate pairs become their character; lone surrogates and control characters go. Every kind of line end becomes
    a newline, more than one blank line becomes one, a run of spaces within a line becomes one space; indentation
    stays (code), spaces at the ends of lines and of the text go. Nothing else changes; applying it twice changes
    nothing more.
    """
    if _SURROGATES.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", text))
    tidy = "\n".join(_tidy_line(line) for line in text.splitlines())
    return _BLANK_LINES.sub("\n\n", tidy).strip()


def _tidy_line(line: str) -> str:
    body = line.strip()
    indent = line[: len(line) - len(line.lstrip())] if body else ""
    return _INDENT_SPACE.sub(" ", indent) + _INNER_SPACE.sub(" ", body)


def query_id(text: str) -> str:
    """Content id of a normalised text: 32 hex characters of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
