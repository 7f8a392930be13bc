"""What an embedding holds, for held-out queries chosen by id, beside the backbone's real response.

It is the text that the backbone writes from the soft prompts alone; the cosine of that text, embedded by the teacher,
to the student's embedding and to the real response, each beside shuffled pairs; per compression token the vocabulary of
highest probability; and the nearest responses.
"""

from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core.artifacts import Artifact
from pipeline.core.bootstrap import BootstrapParams, Delta
from pipeline.core.config import Params
from pipeline.core.errors import section
from pipeline.probe.base import ProbeContext, ProbeResult, described
from pipeline.probe.descriptions import Description
from pipeline.probe.heldout import heldout_rows


class InterpretParams(Params):
    """How many held-out queries are read, and how much of each."""

    queries: int = Field(default=12, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    vocabulary: int = Field(default=8, ge=1, description="words per compression token")
    nearest: int = Field(default=5, ge=0, description="nearest responses of each embedding; 0 = none")
    nearest_among: Literal["heldout", "all"] = Field(
        default="heldout", description="responses to look among: of held-out queries, or of all"
    )


PARAMS = InterpretParams
DESCRIPTION = Description(
    note="How much of the answer can be read from the embedding: the text decoded from it is embedded by the "
    "teacher. cosine_embedding: its cosine to the student's embedding. cosine_response (older: faithfulness): "
    "to the answer. shuffled_pairs: what the same cosine is for texts and answers of different queries.",
    instructed=False,
)


def run(params: InterpretParams, context: ProbeContext) -> ProbeResult:
    """Decode and read.

    Raises EvaluationError if no held-out query has a target, or the teacher is not the one of the targets.
    """
    from pipeline.lens.batch import render_page
    from pipeline.lens.faithfulness import check_teacher
    from pipeline.lens.reading import add_cosines, summaries

    artifacts, heldout = heldout_rows()
    rows, embeddings = _read(params, context.systems.encoder(), artifacts, heldout)
    systems = {}
    for system in context.build(["student", "teacher"]):
        systems[system.name] = described(system)
        if system.name == "teacher":
            with section("embed"):
                check_teacher(system.identity, artifacts[2].manifest.models.get("teacher", {}), "the targets")
                rows = add_cosines(rows, embeddings, partial(system.encode, instruction=""))
        del system  # frees its memory before the next one is loaded
    metrics = _metrics(rows, context.bootstrap)
    page = render_page(rows, rows.num_rows, summaries(rows, context.bootstrap), "What the embeddings hold")
    deltas = _deltas(rows, context.bootstrap)
    return ProbeResult(metrics, rows, systems, artifacts, deltas, {"page.html": page})


def _read(
    params: InterpretParams, encoder: Any, artifacts: tuple[Artifact, ...], heldout: pa.Table
) -> tuple[pa.Table, np.ndarray]:
    """Rows without cosines, and the embeddings of their queries."""
    from pipeline.lens.decoding import decode_soft_prompts
    from pipeline.lens.nearest import index_of_targets
    from pipeline.lens.reading import Entries, Lens, outputs_for_texts

    _, responses, targets = artifacts
    only = heldout["id"].to_pylist() if params.nearest_among == "heldout" else None

    def decoder(soft_prompts: np.ndarray) -> list[str]:
        return decode_soft_prompts(encoder, soft_prompts, max_new_tokens=params.max_new_tokens, show_progress=True)

    lens = Lens(
        encoder,
        decoder,
        vocabulary=params.vocabulary,
        index=index_of_targets(targets, responses, only) if params.nearest else None,
        count=params.nearest,
    )
    shown = heldout.slice(0, params.queries)
    outputs = outputs_for_texts(encoder, shown["text"].to_pylist())
    rows = lens.read(Entries(*(shown[name].to_pylist() for name in ("id", "text", "response"))), outputs)
    return rows, outputs.embeddings


def _metrics(rows: pa.Table, settings: BootstrapParams) -> dict[str, Any]:
    """Scores as `student/<metric>`; interval and chance of each beside it, as facts."""
    from pipeline.lens.reading import summaries

    metrics: dict[str, Any] = {"queries": rows.num_rows}
    for what, found in summaries(rows, settings).items():
        metrics[f"student/cosine_{what}"] = found.mean
        facts = {"interval_low": found.low, "interval_high": found.high, "shuffled_pairs": found.chance}
        metrics |= {f"cosine_{what}/{name}": value for name, value in facts.items()}
    return metrics


def _deltas(rows: pa.Table, settings: BootstrapParams) -> list[Delta]:
    from pipeline.lens.faithfulness import over_chance
    from pipeline.lens.reading import pair_cosines

    found = (over_chance(f"cosine_{name}", pairs, settings) for name, pairs in pair_cosines(rows).items())
    return [delta for delta in found if delta is not None]
