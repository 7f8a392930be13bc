"""Sources of texts as params name them: local files, and data sets of the Hugging Face hub."""

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from pipeline.core.config import Params
from pipeline.core.errors import SourceError, first_line
from pipeline.core.readers.rows import Values, missing_column
from pipeline.core.readers.texts import column_of, file_texts, find_text_files, texts_of

log = logging.getLogger(__name__)

_COMMIT = re.compile("[0-9a-f]{40}")


class _Source(Params):
    instruction: str = Field(default="", description="of collect: put before each text, as those of the evaluation are")
    limit: int | None = Field(default=None, ge=1, description="read the first rows only")
    weight: float | None = Field(default=None, gt=0, description="its share of the sample; for all sources or none")

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an instruction nothing says that there could be one: equal queries keep their manifest."""
        found: dict[str, Any] = handler(self)
        return found if self.instruction else {key: value for key, value in found.items() if key != "instruction"}


class LocalSource(_Source):
    """Files of queries; their ending says the format."""

    kind: Literal["local"]
    path: str = Field(description="a file, a folder or a pattern (shards/*.jsonl.gz), relative to local_dir")
    column: str | None = Field(default=None, description="null: text; a .txt file has no columns")

    @property
    def label(self) -> str:
        """Its name in the column `source`."""
        return self.path


class HubSource(_Source):
    """A data set of the Hugging Face hub, streamed: no row waits for the download of all, and none is stored twice."""

    kind: Literal["hub"]
    name: str
    column: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="commit on the hub; pin it")

    @property
    def label(self) -> str:
        """Its name in the column `source`."""
        return f"{self.name}/{self.config}" if self.config else self.name


Source = Annotated[LocalSource | HubSource, Field(discriminator="kind")]


def read_texts(source: LocalSource | HubSource, local_dir: Path) -> Iterator[str]:
    """The texts of a source as they stand, in its order, at most `source.limit`; a null is an empty text.

    A warning counts the nulls at the end.

    Raises:
        SourceError: a file, data set or column is missing, damaged or holds something else than texts and chats.
    """
    if isinstance(source, HubSource):
        found = texts_of(_hub_values(source), lambda place: f"data set {source.label}, row {place}")
    else:
        path = local_dir / source.path
        files = find_text_files(path, source.column)
        found = itertools.chain.from_iterable(file_texts(file, column_of(file, source.column)) for file in files)
    rows = nulls = 0
    for _, text in itertools.islice(found, source.limit):
        rows += 1
        nulls += text is None
        yield text or ""
    if nulls:
        log.warning("%s: column '%s' is null in %d of %d rows", source.label, source.column or "text", nulls, rows)


def _hub_values(source: HubSource) -> Values:
    what = f"data set {source.label} (split {source.split}, revision {source.revision or 'main'})"
    try:
        rows = _builder(source).as_streaming_dataset(split=source.split)
        if rows.column_names is not None:
            if source.column not in rows.column_names:
                raise missing_column(what, source.column, rows.column_names)
            rows = rows.select_columns([source.column])
        for number, row in enumerate(rows):
            if source.column not in row:  # of CSV and JSON the library learns the columns with the first row
                raise missing_column(what, source.column, row)
            yield number, row[source.column]
    except SourceError:
        raise
    # The library raises whatever the network, the cache or the files give it; all of it is about this data set.
    except Exception as error:
        reason = first_line(error)
        raise SourceError(
            f"cannot read {what}: {reason} (a hub that answers or a filled datasets cache is needed)"
        ) from None


def _builder(source: HubSource) -> Any:
    """The library's builder of a data set.

    Raises SourceError if the cache would stand in for a pinned commit with another one: offline the library serves the
    newest cached version, whatever revision it was asked for.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.csv.csv import Csv

    builder = datasets.load_dataset_builder(source.name, source.config, revision=source.revision)
    pinned = source.revision is not None and _COMMIT.fullmatch(source.revision)
    if pinned and isinstance(builder, Cache) and builder.hash != source.revision:
        raise SourceError(
            f"data set {source.label}: the hub does not answer, and the datasets cache holds revision {builder.hash}, "
            f"not {source.revision}: fill the cache with it, or change the revision",
            argument="revision",
        )
    if isinstance(builder, Csv):  # whose texts would be numbers, or nulls where they are "NA"
        text = datasets.Features({source.column: datasets.Value("string")})
        as_text = {"features": text, "usecols": [source.column], "na_filter": False}
        builder = datasets.load_dataset_builder(source.name, source.config, revision=source.revision, **as_text)
    return builder
