"""Files and hub data sets read as texts or tables: queries, texts to embed, local data sets.

One way to read for all: the files that a path names and their text (`files`), the rows of each format (`rows`), the
text of a value (`chats`); on these the sources of `collect` and `teach` (`sources`), texts to embed (`texts`), tables
of local data sets (`tables`). Nothing is guessed from the first rows, files are streamed, and an error names the file
and its row.
"""

from pipeline.core.readers.files import File, check_not_read, find_files, spooled
from pipeline.core.readers.sources import HubSource, LocalSource, Source, read_texts
from pipeline.core.readers.tables import Columns, open_columns, read_batches, read_table
from pipeline.core.readers.texts import TextFile, check_encodable, open_texts

__all__ = [
    "Columns",
    "File",
    "HubSource",
    "LocalSource",
    "Source",
    "TextFile",
    "check_encodable",
    "check_not_read",
    "find_files",
    "open_columns",
    "open_texts",
    "read_batches",
    "read_table",
    "read_texts",
    "spooled",
]
