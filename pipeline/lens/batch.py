"""The command `decode`: answers to the terminal, or all that can be read of many embeddings to Parquet and a page.

Rows are written in parts: after a kill, the same command continues behind the last finished part. Nearest texts are
looked up last, for thousands of rows at once, because their index may be far larger than the input.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifacts import ArtifactWriter, read_manifest
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import SourceError
from pipeline.core.files import bytes_sha256, write_bytes, write_parquet
from pipeline.core.part_store import Parts, open_parts, whole_file
from pipeline.core.paths import TARGETS_DIR
from pipeline.core.run import progress
from pipeline.core.target_transform import load_transform
from pipeline.core.text import templates, visible
from pipeline.core.vectors import matrix
from pipeline.encoder.embedded_by import made_by, not_made_by
from pipeline.lens.decoding import Decoder, EngineName, open_decoder
from pipeline.lens.faithfulness import Summary, check_teacher, teacher_difference
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

log = logging.getLogger(__name__)

# Covers whatever changes a row.
VERSION = 3
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
        backbone: folder or hub name that vLLM loads; None: the recorded one.
        trust_remote_code: let it run code that comes with it.
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
    trust_remote_code: bool = False


def print_answers(encoder: "Encoder", request: Request) -> None:
    """Print the decoded answers, without control characters."""
    with _decoder(encoder, request) as decoder:
        for chunk in request.source.chunks(PRINTED_ROWS):
            soft = chunk.soft_prompts
            if soft is None:
                soft = _outputs(encoder, chunk, request.instruction).soft_prompts
            for answer in decoder(soft):
                print(visible(answer), flush=True)


def read_to_files(
    encoder: "Encoder", request: Request, output: Path, page: Path | None = None, teacher: "Teacher | None" = None
) -> list[str]:
    """Write what is read to `output` (schema `reading.ROWS`), the first rows as `page`; returns a report in lines.

    Existing files are replaced when the new ones are complete. Without a teacher, cosines stay null.

    Raises:
        SourceError: the source or corpus is damaged or changes meanwhile, or another encoder embedded the corpus.
        EvaluationError, EngineError: the teacher is not the recorded one; the engine cannot start.
        WorkError: the disk is full, or another process does the same work.
    """
    index = None if request.corpus is None else _index(encoder, request.corpus)
    if teacher is not None:
        check_teacher(teacher.identity, encoder.config.teacher, "the encoder")
    rows = CHUNK_ROWS.get(encoder.model.device.type, CHUNK_ROWS["cuda"])
    # What a row depends on besides its source's content.
    conditions = {
        "version": VERSION,
        "chunk_rows": rows,
        "instruction": request.instruction,
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
    with _decoder(encoder, request) as decoder, open_parts("decode", conditions, ".parquet") as parts:
        lens = Lens(encoder, decoder, request.vocabulary, index, request.count)
        paths, reused = _read_all(lens, request, parts, rows, teacher)
        tables = (pq.read_table(path) for path in paths)
        with whole_file(output) as unfinished:
            found = _with_nearest(lens, tables, parts.within("nearest")) if lens.searches else tables
            ArtifactWriter(unfinished.parent).write_stream(unfinished.name, found, ROWS)
    from_before = f" ({reused} of them from the run before)" if reused else ""
    return [f"{request.source.rows} texts read -> {output}{from_before}", *_report(output, page, request.source.name)]


def _index(encoder: "Encoder", corpus: Path) -> Index:
    """The known texts. Their vectors must be predicted responses; the instruction before them may differ."""
    index = open_index(corpus)
    config = encoder.config
    beside = index.width == encoder.width != config.width
    rotated, added = config.rotated_width is not None, config.response_share < 1 and config.response_form == "added"
    if beside or ((rotated or added) and corpus.is_file()):
        what = "rotated embeddings" if rotated else f"readings {'added to' if added else 'beside'} predicted responses"
        message = f"{corpus} holds {what}, and decode looks among predicted responses alone: give data/targets"
        raise SourceError(message, argument="corpus")
    check_width(index, encoder.config.width)
    if corpus.is_dir():
        _check_targets(encoder, corpus / TARGETS_DIR.name)
    problem = not_made_by(encoder, corpus) if corpus.is_file() else None
    if problem is not None:
        message = f"{corpus} {problem}: cosines would mean nothing; make it with encode by this encoder"
        raise SourceError(message, argument="corpus")
    return index


def _check_targets(encoder: "Encoder", folder: Path) -> None:
    """Raises SourceError unless targets lie in the space of predicted responses: that of one teacher and transform."""
    config, teacher = encoder.config, read_manifest(folder).manifest.models.get("teacher", {})
    if difference := teacher_difference(teacher, config.teacher, "the encoder"):
        message = f"{folder} is of another teacher than the encoder's ({difference}): cosines would mean nothing"
        raise SourceError(message, argument="corpus")
    transform = load_transform(folder)
    found = None if transform is None else transform.identity
    if found == config.transform:
        return
    ours, theirs = ("not transformed" if each is None else each["kind"] for each in (config.transform, found))
    if ours != theirs:
        message = f"{folder} is {theirs}, the encoder's targets were {ours}: cosines would mean nothing"
        raise SourceError(message, argument="corpus")
    # Of a transform that turns nothing they differ little.
    log.warning(
        "%s: its transform (%s) is not the one that the encoder was trained behind: cosines differ", folder, theirs
    )


def _report(output: Path, page: Path | None, title: str) -> list[str]:
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


def _decoder(encoder: "Encoder", request: Request) -> AbstractContextManager[Decoder]:
    return open_decoder(
        request.engine,
        encoder,
        compression_tokens=request.source.tokens or encoder.config.compression_tokens,
        max_new_tokens=request.max_new_tokens,
        backbone=request.backbone,
        trust_remote_code=request.trust_remote_code,
    )


def _outputs(encoder: "Encoder", chunk: Chunk, instruction: str) -> EncoderOutputs:
    if chunk.soft_prompts is not None:
        return outputs_for_soft_prompts(encoder, chunk.soft_prompts)
    return outputs_for_texts(encoder, [query or "" for query in chunk.entries.queries], instruction)


def _read_all(
    lens: Lens, request: Request, parts: Parts, rows: int, teacher: "Teacher | None"
) -> tuple[list[Path], int]:
    """Files of all parts in order, and how many rows were reused."""
    paths: list[Path] = []
    reused = total = 0
    with progress(list[str](), total=request.source.rows, desc="decode", unit="text") as bar:
        for position, chunk in enumerate(request.source.chunks(rows)):
            content = [list(chunk.entries.ids), list(chunk.entries.responses)]
            part = parts.find(position, content)
            count = len(chunk.entries.ids)
            if part is not None:
                reused += count
                bar.initial += count
            paths.append(part or parts.put(position, content, _to_parquet(_read(lens, chunk, request, teacher))))
            total += count
            bar.update(count)
    if total != request.source.rows:
        raise SourceError(f"{request.source.name} changed while it was read: run again")
    return paths, reused


def _read(lens: Lens, chunk: Chunk, request: Request, teacher: "Teacher | None") -> pa.Table:
    outputs = _outputs(lens.encoder, chunk, request.instruction)
    table = replace(lens, index=None).read(chunk.entries, outputs)
    if teacher is not None:
        table = add_cosines(table, outputs.embeddings, teacher.embed)
    if not lens.searches:
        return table
    flat = pa.array(outputs.embeddings.reshape(-1))
    return table.append_column(_EMBEDDING, pa.FixedSizeListArray.from_arrays(flat, outputs.embeddings.shape[1]))


def _with_nearest(lens: Lens, tables: Iterator[pa.Table], parts: Parts) -> Iterator[pa.Table]:
    """The rows with their nearest texts in place of their embeddings, looked up in groups."""
    for position, group in enumerate(_groups(tables)):
        embeddings = matrix(group[_EMBEDDING])
        digest = bytes_sha256(embeddings.tobytes())
        part = parts.find(position, digest)
        found = part or parts.put(position, digest, _to_parquet(pa.table({"nearest": lens.nearest(embeddings)})))
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


def _to_parquet(table: pa.Table) -> pa.Buffer:
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
