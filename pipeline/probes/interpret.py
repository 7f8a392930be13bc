"""What an embedding holds: the answer decoded from its soft prompts, and the words nearest to its tokens.

For held-out queries, chosen by id: the backbone's real response, the text that the backbone writes from the soft
prompts alone, the cosine between the teacher's embeddings of those two texts (how faithful the decoded answer is), and
per compression token the vocabulary of highest logit.
"""

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.evaluation.systems import System
from pipeline.heldout import heldout_rows
from pipeline.params import Params
from pipeline.probes.base import ProbeContext, ProbeResult, described

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("response", pa.string()),
        ("decoded", pa.string()),
        ("faithfulness", pa.float32()),
        ("vocabulary", pa.list_(pa.list_(pa.string()))),
    ]
)


class InterpretParams(Params):
    """How many held-out queries are read, and how much of each."""

    queries: int = Field(default=12, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    vocabulary: int = Field(default=8, ge=1, description="words per compression token")


PARAMS = InterpretParams


def run(params: InterpretParams, context: ProbeContext) -> ProbeResult:
    """Decode and read.

    Raises:
        EvaluationError: no held-out query has a target.
        ArtifactError: an artifact is missing or damaged.
    """
    from pipeline.lens import decode, nearest_vocabulary

    artifacts, table = heldout_rows()
    table = table.slice(0, params.queries)
    texts, responses = table["text"].to_pylist(), table["response"].to_pylist()
    student, teacher = context.build(["student", "teacher"])
    encoder = context.systems.encoder()
    decoded = decode(encoder, texts, max_new_tokens=params.max_new_tokens)
    faithful = faithfulness(teacher, decoded, responses)
    columns = {
        "id": table["id"],
        "query": texts,
        "response": responses,
        "decoded": decoded,
        "faithfulness": faithful,
        "vocabulary": nearest_vocabulary(encoder, texts, count=params.vocabulary),
    }
    metrics = {"queries": len(texts), "student/faithfulness": round(float(faithful.mean()), 6)}
    systems = {system.name: described(system) for system in (student, teacher)}
    return ProbeResult(metrics, pa.table(columns, schema=ROWS), systems, artifacts)


def faithfulness(teacher: System, decoded: list[str], responses: list[str]) -> np.ndarray:
    """Cosine float32 [N] between the teacher's embeddings of what was decoded and what was really answered."""
    first, second = teacher.encode(decoded, ""), teacher.encode(responses, "")
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return ((first * second).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
