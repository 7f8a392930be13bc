"""The closed-form start of a student, from the training rows and the backbone's input embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.encoder.batching import epoch_order
from pipeline.encoder.data import TrainingRows
from pipeline.encoder.passes import Passes
from pipeline.encoder.student import Student, input_embeddings
from pipeline.encoder.warm_start import accumulate, frame_rows, warm_start
from pipeline.training.params import TrainParams


def warm_start_student(
    student: Student, passes: Passes, rows: TrainingRows, params: TrainParams, backbone: Any, frame_ids: Sequence[int]
) -> float:
    """Give `student` its closed-form start from (at most `params.warm_start.rows`) training rows.

    Args:
        student: changed in place.
        passes: how batches run through the frozen backbone.
        rows: to train on.
        params: section `train`.
        backbone: whose input embeddings the soft prompts start like.
        frame_ids: the prompt of an empty query; its end is what the soft prompts start from.

    Returns:
        The ridge strength used.
    """
    words = input_embeddings(backbone).float().cpu().numpy()
    chosen = np.sort(epoch_order(len(rows), 0, params.seed)[: params.warm_start.rows]).tolist()
    statistics = accumulate(student, passes, rows, chosen, params.micro_batch_size)
    frame = frame_rows(words, frame_ids, student.compression_tokens)
    norm = float(np.linalg.norm(words, axis=-1).mean())
    return warm_start(student, statistics, frame, norm, params.warm_start.ridge)
