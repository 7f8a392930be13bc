"""The held-out rows: queries that were not trained on, with the backbone's response and its target."""

import pyarrow as pa

from pipeline.core.artifacts import Artifact, open_artifact
from pipeline.core.errors import EvaluationError, TrainingError
from pipeline.core.paths import HELDOUT_TABLE, QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR


def heldout_rows() -> tuple[tuple[Artifact, ...], pa.Table]:
    """The three data artifacts of the workspace, and the held-out queries that have a target, sorted by id.

    The table also has `response`, `finish_reason`, `embedding`. Raises EvaluationError if no held-out query has a
    target.
    """
    from pipeline.train.data import read_joined

    queries, responses, targets = (open_artifact(path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR))
    try:
        table = pa.concat_tables(read_joined(queries, responses, targets, HELDOUT_TABLE))
    except TrainingError as error:
        raise EvaluationError(f"held-out queries: {error}") from None
    return (queries, responses, targets), table
