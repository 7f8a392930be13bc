"""`python -m pipeline decode`: answers to the terminal, or all that can be read of many embeddings to files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifacts import ArtifactWriter, bytes_sha256, write_bytes, write_parquet
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import SourceError
from pipeline.core.part_store import Parts, open_parts, whole_file
from pipeline.core.run import progress
from pipeline.core.text import templates, visible
from pipeline.core.vectors import matrix
from pipeline.encoder.encode_file import made_by, not_made_by
from pipeline.lens.decoding import EngineName, open_decoder
from pipeline.lens.faithfulness import Summary, check_teacher
from pipeline.lens.nearest import Index, check_width, open_index
from pipeline.lens.reading import ROWS, Lens, held_by, held_in, measured, summaries
from pipeline.lens.sources import Chunk, Source

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder


# Answers on a terminal come in chunks: the first ones are there while the others are decoded.
PRINTED_ROWS = 16


@dataclass(frozen=True)
class Request:
    """What to read, and how.

    Attributes:
        source: the rows.
        instruction: before each text.
        max_new_tokens: of an answer at most.
        engine: that decodes.
        backbone: its place, None for the recorded one.
        vocabulary: words a compression token, 0 for none.
        corpus: to find the nearest in, see `open_index`; None for none.
        count: of the nearest.
    """

    source: Source
    instruction: str = ""
    max_new_tokens: int = 64
    engine: EngineName = "transformers"
    backbone: str | None = None
    vocabulary: int = 8
    corpus: Path | None = None
    count: int = 5


def print_answers(encoder: "Encoder", request: Request) -> None:
    """Print the answer that each embedding holds, without what a terminal would obey.

    Raises:
        PipelineError: the source is damaged, or the engine cannot start.
    """
    with open_decoder(request.engine, encoder, **_decoding(encoder, request)) as decoder:
        for chunk in request.source.chunks(PRINTED_ROWS):
            if chunk.soft_prompts is None:
                texts = [query or "" for query in chunk.entries.queries]
                held = held_by(encoder, texts, request.instruction)
            else:
                held = held_in(encoder, chunk.soft_prompts)
            for answer in decoder(held.soft_prompts):
                print(visible(answer), flush=True)


def read_to_files(
    encoder: "Encoder", request: Request, output: Path, page: Path | None = None, teacher: "Teacher | None" = None
) -> list[str]:
    """Write what is read to `output`, the first rows as `page` too; what to say of it, line by line.

    Raises:
        PipelineError: the source or corpus is damaged, the corpus was embedded by another encoder, the engine cannot
            start, or the teacher is another one.
    """
    index = None if request.corpus is None else _index(encoder, request.corpus)
    if teacher is not None:
        check_teacher(teacher.identity, encoder.config.teacher, "the encoder")
    conditions = _conditions(encoder, request, index, teacher)
    with open_decoder(request.engine, encoder, **_decoding(encoder, request)) as decoder:
        lens = Lens(encoder, decoder, request.vocabulary, index, request.count)
        written = write_rows(
            lens,
            request.source,
            output,
            conditions=conditions,
            instruction=request.instruction,
            embed=teacher.embed if teacher else None,
        )
    kept = f" ({written.kept} of them from the run before)" if written.kept else ""
    return [f"{written.rows} texts read -> {output}{kept}", *_judged(output, page, request.source.name)]


def _index(encoder: "Encoder", corpus: Path) -> Index:
    """The known texts, if their vectors can be compared with the encoder's; the instruction before them may differ."""
    index = open_index(corpus)
    problem = not_made_by(encoder, corpus) if corpus.is_file() else None
    if problem is not None:
        raise SourceError(
            f"--corpus: {corpus} {problem}: cosines would mean nothing; make it with encode --output NAME.parquet by "
            "this encoder"
        )
    return index


def _judged(output: Path, page: Path | None, title: str) -> list[str]:
    """The cosines of the rows in words; the page is written by the way."""
    cosines = pq.read_table(output, columns=[f"{kind}_{to}" for to in _TO for kind in ("cosine", "chance")])
    found = summaries(cosines, BootstrapParams())
    lines = []
    for to, summary in found.items():
        interval = "" if summary.low is None else f" [{summary.low:.3f}, {summary.high:.3f}]"
        chance = "" if summary.chance is None else f", shuffled pairs {summary.chance:.3f}"
        lines.append(f"cosine of the decoded text to {_TO[to]}: {summary.mean:.3f}{interval}{chance}")
    if page is not None:
        with pq.ParquetFile(output) as file:
            rows = file.read_row_group(0)
        html = render_page(rows, cosines.num_rows, found, f"What the embeddings of {title} hold")
        write_bytes(page, html.encode())
        lines.append(f"the first rows as a page -> {page}")
    return lines


_TO = {"embedding": "its embedding", "response": "the real response"}


def _decoding(encoder: "Encoder", request: Request) -> dict[str, Any]:
    return {
        "compression_tokens": request.source.tokens or encoder.config.compression_tokens,
        "max_new_tokens": request.max_new_tokens,
        "place": request.backbone,
    }


def _conditions(encoder: "Encoder", request: Request, index: Index | None, teacher: "Teacher | None") -> dict[str, Any]:
    """What decides a row besides its source."""
    return {
        "made_by": made_by(encoder, request.instruction),
        "dtype": str(encoder.model.dtype),
        "device": encoder.model.device.type,
        "engine": request.engine,
        "max_new_tokens": request.max_new_tokens,
        "vocabulary": request.vocabulary,
        "index": None if index is None else [index.name, index.version, request.count],
        "teacher": None if teacher is None else teacher.identity,
        "source": request.source.name,
    }


# Rows that were read, as a page of its own: one HTML file that asks for no other.

# A page of more is slow to open; the Parquet file has them all.
PAGE_ROWS = 500


def render_page(rows: pa.Table, total: int, summaries: Mapping[str, Summary], title: str) -> str:
    """The page of the first `PAGE_ROWS` of `total` rows (schema `reading.ROWS`)."""
    environment = templates(Path(__file__).parent)
    environment.filters.update(number=number, token=token)
    shown = rows.slice(0, PAGE_ROWS).to_pylist()
    has = {name: _has(shown, name) for name in ("query", "response", "vocabulary", "nearest")}
    template = environment.get_template("page.html.j2")
    return template.render(rows=shown, total=total, summaries=summaries, title=title, has=has)


def number(value: float | None) -> str:
    """A cosine or probability; a dash for none."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def token(text: str) -> str:
    """An entry of a vocabulary, its white space shown: a word begins with a space in most."""
    return visible(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _has(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(row[name] is not None for row in rows)


# Rows that are read, written to Parquet of any size. Killed and run again, it goes on behind the last finished chunk.
#
# Known texts are looked for at the end, for thousands of rows at once: their index may be far larger than the input.

Array = np.ndarray[Any, Any]

# Covers whatever changes a row.
VERSION = 2
# Rows of a part, by device: what a kill costs at most, and what shuffled pairs are drawn from.
CHUNK_ROWS = {"cpu": 64, "cuda": 1024}
# Rows that go through an index together; of 4,096 dimensions they take 128 MiB.
GROUP_ROWS = 8192
# Column of a part, beside those of its rows, where the nearest are still to be found.
_EMBEDDING = "embedding"


class Written(NamedTuple):
    """How many rows there are, and how many of them an earlier run had read."""

    rows: int
    kept: int


def write_rows(
    lens: Lens,
    source: Source,
    output: Path,
    *,
    conditions: Mapping[str, Any],
    instruction: str = "",
    embed: Callable[[Sequence[str]], Array] | None = None,
    chunk_rows: int | None = None,
) -> Written:
    """Read a source and write the rows (schema `reading.ROWS`).

    Args:
        lens: reads.
        source: what.
        output: appears when it is complete; a file there is replaced.
        conditions: what decides a row besides its source (serialises to JSON): under others nothing is taken over.
        instruction: before each text, see `Encoder.encode`.
        embed: the teacher, for the cosines; None leaves them null.
        chunk_rows: rows of a part; None: `CHUNK_ROWS` of the device.

    Raises:
        SourceError: the source is damaged or changes meanwhile, or the lens' index is of another width.
        WorkError: the disk is full, or another process is at the same work.
    """
    if lens.index is not None:
        check_width(lens.index, lens.encoder.width)
    device = lens.encoder.model.device.type
    rows = chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])
    everything = {"version": VERSION, "chunk_rows": rows, "instruction": instruction, **conditions}
    with open_parts("decode", everything, ".parquet") as parts:
        done, kept = _read_all(lens, source, parts, rows, instruction, embed)
        tables = (pq.read_table(path) for path in done)
        with whole_file(output) as unfinished:
            found = _with_nearest(lens, tables, parts.within("nearest")) if lens.searches else tables
            ArtifactWriter(unfinished.parent).write_stream(unfinished.name, found, ROWS)
    return Written(source.rows, kept)


def _read_all(
    lens: Lens,
    source: Source,
    parts: Parts,
    rows: int,
    instruction: str,
    embed: Callable[[Sequence[str]], Array] | None,
) -> tuple[list[Path], int]:
    """All parts in order, those that are missing made, and how many rows were there before."""
    done: list[Path] = []
    kept = read = 0
    nothing: list[str] = []
    with progress(nothing, total=source.rows, desc="decode", unit="text") as bar:
        for place, chunk in enumerate(source.chunks(rows)):
            made_of = [list(chunk.entries.ids), list(chunk.entries.responses)]
            part = parts.find(place, made_of)
            count = len(chunk.entries.ids)
            if part is not None:
                kept += count
                bar.initial += count
            done.append(part or parts.put(place, made_of, _content(_read(lens, chunk, instruction, embed))))
            read += count
            bar.update(count)
    if read != source.rows:
        raise SourceError(f"{source.name} changed while it was read: run again")
    return done, kept


def _read(lens: Lens, chunk: Chunk, instruction: str, embed: Callable[[Sequence[str]], Array] | None) -> pa.Table:
    if chunk.soft_prompts is None:
        held = held_by(lens.encoder, [query or "" for query in chunk.entries.queries], instruction)
    else:
        held = held_in(lens.encoder, chunk.soft_prompts)
    table = replace(lens, index=None).read(chunk.entries, held)
    table = table if embed is None else measured(table, held.embeddings, embed)
    return table.append_column(_EMBEDDING, _column(held.embeddings)) if lens.searches else table


def _with_nearest(lens: Lens, tables: Iterator[pa.Table], parts: Parts) -> Iterator[pa.Table]:
    """The rows with their nearest in place of their embeddings; a group of them goes through the index at once."""
    for place, group in enumerate(_groups(tables)):
        embeddings = matrix(group[_EMBEDDING])
        made_of = bytes_sha256(embeddings.tobytes())
        part = parts.find(place, made_of)
        found = part or parts.put(place, made_of, _content(pa.table({"nearest": lens.near(embeddings)})))
        yield group.drop_columns(["nearest", _EMBEDDING]).append_column("nearest", pq.read_table(found)["nearest"])


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables put together to `GROUP_ROWS` rows or a little more, the last one shorter."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(each.num_rows for each in group) >= GROUP_ROWS:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def _column(embeddings: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])


def _content(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    write_parquet(table, sink)
    return sink.getvalue()
