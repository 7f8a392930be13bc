"""The command `decode`: answers to the terminal, or all that can be read of many embeddings to Parquet and a page.

Rows are written in parts: after a kill, the same command continues behind the last finished part. Nearest texts are
looked up last, for thousands of rows at once, because their index may be far larger than the input.
"""

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
from pipeline.lens.reading import (
    ROWS,
    EncoderOutputs,
    Lens,
    add_cosines,
    outputs_for_soft_prompts,
    outputs_for_texts,
    summaries,
)
from pipeline.lens.sources import Chunk, Source

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder

Array = np.ndarray[Any, Any]

# Covers whatever changes a row.
VERSION = 2
# Rows decoded before their answers are printed.
PRINTED_ROWS = 16
# Rows of a part, by device: what a kill costs at most, and what shuffled pairs are drawn from.
CHUNK_ROWS = {"cpu": 64, "cuda": 1024}
# Rows that are searched for in an index together; of 4,096 dimensions they take 128 MiB.
GROUP_ROWS = 8192
# Rows of a page; one with more is slow to open, and the Parquet file has them all.
PAGE_ROWS = 500
# Column of a part beside `ROWS`, from which the nearest texts are looked up.
_EMBEDDING = "embedding"
_COUNTERPARTS = {"embedding": "its embedding", "response": "the real response"}


@dataclass(frozen=True)
class Request:
    """What to read, and how.

    Attributes:
        source: the rows.
        instruction: put before each text.
        max_new_tokens: maximum length of an answer.
        engine: that decodes.
        backbone: folder or hub name that vLLM loads; None: the recorded one.
        vocabulary: words per compression token; 0: none.
        corpus: of known texts, see `open_index`; None: none.
        count: nearest texts per row.
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
    """Print the decoded answers, without control characters.

    Raises:
        PipelineError: the source is damaged, or the engine cannot start.
    """
    with open_decoder(request.engine, encoder, **_decoding(encoder, request)) as decoder:
        for chunk in request.source.chunks(PRINTED_ROWS):
            for answer in decoder(_outputs(encoder, chunk, request.instruction).soft_prompts):
                print(visible(answer), flush=True)


def read_to_files(
    encoder: "Encoder", request: Request, output: Path, page: Path | None = None, teacher: "Teacher | None" = None
) -> list[str]:
    """Write what is read to `output`, and the first rows as `page`; returns lines that report on it.

    Raises:
        PipelineError: the source or corpus is damaged, the corpus was embedded by another encoder, the engine cannot
            start, or the teacher is not the recorded one.
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
    reused = f" ({written.reused} of them from the run before)" if written.reused else ""
    return [f"{written.rows} texts read -> {output}{reused}", *_report(output, page, request.source.name)]


def _index(encoder: "Encoder", corpus: Path) -> Index:
    """The known texts. Their vectors must be the encoder's; the instruction before them may differ."""
    index = open_index(corpus)
    problem = not_made_by(encoder, corpus) if corpus.is_file() else None
    if problem is not None:
        raise SourceError(
            f"{corpus} {problem}: cosines would mean nothing; make it with encode --output NAME.parquet by this "
            "encoder",
            argument="corpus",
        )
    return index


def _report(output: Path, page: Path | None, title: str) -> list[str]:
    """Mean cosines in words; writes the page."""
    cosines = pq.read_table(
        output, columns=[f"{kind}_{name}" for name in _COUNTERPARTS for kind in ("cosine", "chance")]
    )
    found = summaries(cosines, BootstrapParams())
    lines = []
    for name, summary in found.items():
        interval = "" if summary.low is None else f" [{summary.low:.3f}, {summary.high:.3f}]"
        chance = "" if summary.chance is None else f", shuffled pairs {summary.chance:.3f}"
        lines.append(f"cosine of the decoded text to {_COUNTERPARTS[name]}: {summary.mean:.3f}{interval}{chance}")
    if page is not None:
        with pq.ParquetFile(output) as file:
            rows = file.read_row_group(0)
        html = render_page(rows, cosines.num_rows, found, f"What the embeddings of {title} hold")
        write_bytes(page, html.encode())
        lines.append(f"the first rows as a page -> {page}")
    return lines


def _decoding(encoder: "Encoder", request: Request) -> dict[str, Any]:
    return {
        "compression_tokens": request.source.tokens or encoder.config.compression_tokens,
        "max_new_tokens": request.max_new_tokens,
        "backbone": request.backbone,
    }


def _conditions(encoder: "Encoder", request: Request, index: Index | None, teacher: "Teacher | None") -> dict[str, Any]:
    """What a row depends on besides its source."""
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


class Written(NamedTuple):
    """Number of rows, and how many of them an earlier run had read."""

    rows: int
    reused: int


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
        lens: that reads.
        source: the rows.
        output: appears when it is complete; an existing file is replaced.
        conditions: what a row depends on besides its source (serialises to JSON); parts made under others are not used.
        instruction: put before each text, see `Encoder.encode`.
        embed: the teacher, for the cosines; None leaves them null.
        chunk_rows: rows of a part; None: `CHUNK_ROWS` of the device.

    Raises:
        SourceError: the source is damaged or changes meanwhile, or the lens' index has another width.
        WorkError: the disk is full, or another process does the same work.
    """
    if lens.index is not None:
        check_width(lens.index, lens.encoder.width)
    rows = chunk_rows or CHUNK_ROWS.get(lens.encoder.model.device.type, CHUNK_ROWS["cuda"])
    everything = {"version": VERSION, "chunk_rows": rows, "instruction": instruction, **conditions}

    def read(chunk: Chunk) -> pa.Table:
        outputs = _outputs(lens.encoder, chunk, instruction)
        table = replace(lens, index=None).read(chunk.entries, outputs)
        table = table if embed is None else add_cosines(table, outputs.embeddings, embed)
        return table.append_column(_EMBEDDING, _column(outputs.embeddings)) if lens.searches else table

    with open_parts("decode", everything, ".parquet") as parts:
        paths, reused = _read_all(source, parts, rows, read)
        tables = (pq.read_table(path) for path in paths)
        with whole_file(output) as unfinished:
            found = _with_nearest(lens, tables, parts.within("nearest")) if lens.searches else tables
            ArtifactWriter(unfinished.parent).write_stream(unfinished.name, found, ROWS)
    return Written(source.rows, reused)


def _outputs(encoder: "Encoder", chunk: Chunk, instruction: str) -> EncoderOutputs:
    if chunk.soft_prompts is not None:
        return outputs_for_soft_prompts(encoder, chunk.soft_prompts)
    return outputs_for_texts(encoder, [query or "" for query in chunk.entries.queries], instruction)


def _read_all(source: Source, parts: Parts, rows: int, read: Callable[[Chunk], pa.Table]) -> tuple[list[Path], int]:
    """Files of all parts in order, and how many rows were reused."""
    paths: list[Path] = []
    reused = total = 0
    no_items: list[str] = []
    with progress(no_items, total=source.rows, desc="decode", unit="text") as bar:
        for position, chunk in enumerate(source.chunks(rows)):
            made_of = [list(chunk.entries.ids), list(chunk.entries.responses)]
            part = parts.find(position, made_of)
            count = len(chunk.entries.ids)
            if part is not None:
                reused += count
                bar.initial += count
            paths.append(part or parts.put(position, made_of, _content(read(chunk))))
            total += count
            bar.update(count)
    if total != source.rows:
        raise SourceError(f"{source.name} changed while it was read: run again")
    return paths, reused


def _with_nearest(lens: Lens, tables: Iterator[pa.Table], parts: Parts) -> Iterator[pa.Table]:
    """The rows with their nearest texts in place of their embeddings, looked up in groups."""
    for position, group in enumerate(_groups(tables)):
        embeddings = matrix(group[_EMBEDDING])
        made_of = bytes_sha256(embeddings.tobytes())
        part = parts.find(position, made_of)
        found = part or parts.put(position, made_of, _content(pa.table({"nearest": lens.nearest(embeddings)})))
        yield group.drop_columns(["nearest", _EMBEDDING]).append_column("nearest", pq.read_table(found)["nearest"])


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables concatenated to at least `GROUP_ROWS` rows, the last one shorter."""
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


def render_page(rows: pa.Table, total: int, summaries: Mapping[str, Summary], title: str) -> str:
    """The page of the first `PAGE_ROWS` of `total` rows (schema `reading.ROWS`)."""
    environment = templates(Path(__file__).parent)
    environment.filters.update(number=number, token=token)
    shown = rows.slice(0, PAGE_ROWS).to_pylist()
    columns = ("query", "response", "vocabulary", "nearest")
    has = {name: any(row[name] is not None for row in shown) for name in columns}
    template = environment.get_template("page.html.j2")
    return template.render(rows=shown, total=total, summaries=summaries, title=title, has=has)


def number(value: float | None) -> str:
    """A cosine or probability; a dash for None."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def token(text: str) -> str:
    """An entry of the vocabulary with visible white space; most words begin with a space."""
    return visible(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
