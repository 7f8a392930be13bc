"""How work on texts is shared out; what processes do with it is tested with the teachers and the encoder."""

import pytest

from pipeline.parallel.text_pool import split_texts

TEXTS = [f"{'long ' * (index % 7)}text {index}" for index in range(50)]


@pytest.mark.parametrize(
    ("texts", "processes", "sizes"), [(50, 3, [4] * 12 + [2]), (7, 2, [4, 3]), (4, 3, [2, 2]), (0, 2, [])]
)
def test_jobs_are_batches_of_like_lengths_the_longest_first(texts: int, processes: int, sizes: list[int]) -> None:
    jobs = split_texts(TEXTS[:texts], 4, processes)
    assert [len(job) for job in jobs] == sizes
    assert sorted(row for job in jobs for row in job) == list(range(texts))
    lengths = [len(TEXTS[row]) for job in jobs for row in job]
    assert lengths == sorted(lengths, reverse=True)
