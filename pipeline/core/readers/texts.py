"""Files of texts to embed: one column, read as often as needed."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import SourceError
from pipeline.core.readers.chats import text_of
from pipeline.core.readers.files import File, find_files
from pipeline.core.readers.rows import DEFAULT_COLUMN, Values, values, where
from pipeline.core.text import normalize_text

Texts = Iterator[tuple[int, str | None]]


@dataclass(frozen=True)
class TextFile:
    """The texts of a file, or of the files of a folder or pattern, in their order; `open_texts` makes one.

    Attributes:
        path: as it was named.
        identity: what names the input in unfinished work.
        column: of the texts; None for .txt.
        rows: how many texts there are.
        tidy: whether texts are normalised as the pipeline's queries are; else they stay as they stand.
    """

    path: Path
    files: tuple[File, ...]
    identity: str
    column: str | None
    rows: int
    tidy: bool = False

    def __iter__(self) -> Iterator[str]:
        """The texts.

        Raises:
            SourceError: a file is damaged.
        """
        for file in self.files:
            for _, text in file_texts(file, self.column):
                # None: a null that came after the file was checked; whoever goes by its rows will notice.
                yield normalize_text(text or "") if self.tidy else text or ""

    def chunks(self, rows: int) -> Iterator[list[str]]:
        """The texts in lists of `rows`, the last one shorter. See `__iter__`."""
        texts = iter(self)
        while chunk := list(itertools.islice(texts, rows)):
            yield chunk


def open_texts(
    path: Path | File, column: str | None = None, *, tidy: bool = False, identity: str | None = None
) -> TextFile:
    """Read through the files of a path (or one file) once, to check their texts and to count them.

    `column` is "text" by default, not for .txt; `identity` is the resolved path by default.

    Raises:
        SourceError: a file or the column is missing, damaged or empty, has nulls or holds something else than texts.
    """
    files = find_text_files(path, column)
    column = column_of(files[0], column)
    rows = nulls = 0
    first = ""
    for file in files:
        for place, text in file_texts(file, column):
            rows += 1
            if text is None:
                nulls, first = nulls + 1, first or where(file, place)
            elif not tidy:
                check_encodable(text, (file, place))
    if nulls:
        shown = first.removeprefix(f"{path}, ")
        raise SourceError(f"{path}: column '{column}' is null in {nulls} rows, first in {shown}", argument="column")
    if not rows:
        raise SourceError(f"{path} holds no text", argument="path")
    named = path.path if isinstance(path, File) else path
    return TextFile(named, tuple(files), identity or str(named.resolve()), column, rows, tidy)


def check_encodable(text: str, place: str | tuple[File, int]) -> None:
    """Raises SourceError if a text holds half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        name = place if isinstance(place, str) else where(*place)
        half = f"holds {text[error.start]!r} at character {error.start}, half of a surrogate pair"
        raise SourceError(f"{name} {half}: tidying drops it", argument="tidy") from None


def find_text_files(path: Path | File, column: str | None) -> list[File]:
    """The files of a path, which all have the column; raises SourceError as `find_files`."""
    files = [path] if isinstance(path, File) else find_files(path)
    for file in files:
        column_of(file, column)
    return files


def column_of(file: File, column: str | None) -> str | None:
    """The column to read; None for .txt."""
    if file.format != ".txt":
        return column or DEFAULT_COLUMN
    if column is not None:
        raise SourceError(f"{file}: a .txt file has no columns: leave out '{column}'", argument="column")
    return None


def file_texts(file: File, column: str | None) -> Texts:
    """The texts of one file, with their places; None of a null. Raises SourceError as `values`, or of no text."""
    return texts_of(values(file, column), lambda place: where(file, place))


def texts_of(found: Values, where: Callable[[int], str]) -> Texts:
    """Values as texts; raises SourceError, with the place, of one that is neither a text nor a chat."""
    for place, value in found:
        try:
            text = text_of(value)
        except ValueError as error:
            raise SourceError(f"{where(place)}: {error}", argument="column") from None
        yield place, text
