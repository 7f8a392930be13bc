"""`python -m pipeline decode`: answers to the terminal, or all that can be read of many embeddings to files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.artifacts import write_bytes
from pipeline.encoding import made_by, not_made_by
from pipeline.errors import SourceError
from pipeline.evaluation.statistics import BootstrapParams
from pipeline.lens.decoding import EngineName, open_decoder
from pipeline.lens.faithfulness import check_teacher
from pipeline.lens.nearest import Index, open_index
from pipeline.lens.page import render_page
from pipeline.lens.reading import Lens, held_by, held_in, summaries
from pipeline.lens.sources import Source
from pipeline.lens.writing import write_rows
from pipeline.printable import visible

if TYPE_CHECKING:
    from pipeline.encoder.inference import Encoder
    from pipeline.teachers.base import Teacher

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
