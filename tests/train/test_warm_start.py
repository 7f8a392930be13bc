"""The closed-form start solves the problem it says it solves, whatever batches its rows came in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.core.errors import TrainingError
from pipeline.core.part_store import Parts
from pipeline.core.vectors import rank_own
from pipeline.encoder.student import Student
from pipeline.parallel.launch import launch_ranks
from pipeline.train.data import TrainingRows
from pipeline.train.ridge import LinearMap, Moments, fit_ridge
from pipeline.train.states import RowPasses, States
from pipeline.train.warm_start import (
    FOLDS,
    STRENGTHS,
    Statistics,
    accumulate,
    choose_strength,
    fit_reconstruction,
    frame_rows,
    warm_start,
)
from tests.conftest import ROOT
from tests.train.shared_start_run import ROWS
from tests.train.shared_start_run import run as run_shared_start

IDENTITY = LinearMap(np.eye(6), np.zeros(6))


def linear_problem(rows: int = 200, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    hidden = generator.normal(3.0, 2.0, (rows, 4, 6)).astype(np.float32)
    weight = generator.normal(size=(5, 6))
    targets = hidden.mean(1) @ weight.T + 0.7 + noise * generator.normal(size=(rows, 5))
    return hidden, targets.astype(np.float32)


def batches(rows: int, size: int) -> Iterator[Sequence[int]]:
    order = np.random.default_rng(5).permutation(rows).tolist()
    yield from (order[start : start + size] for start in range(0, rows, size))


def statistics_of(hidden: np.ndarray, targets: np.ndarray, size: int = 10**6) -> Statistics:
    statistics = Statistics(*hidden.shape[1:])
    for rows in batches(len(hidden), size):
        statistics.add(rows, States.of(hidden[rows], hidden.shape[1]), targets[rows])
    return statistics


def in_memory_strength(features: np.ndarray, targets: np.ndarray) -> float:
    """The choice as it reads with all features in one array."""
    fold = np.arange(len(features)) % FOLDS
    scores = np.zeros(len(STRENGTHS))
    for left_out in range(FOLDS):
        inside, outside = fold != left_out, fold == left_out
        maps = fit_ridge(Moments.of(features[inside], targets[inside]), STRENGTHS)
        scores += [rank_own(fitted(features[outside]), targets[outside]).mrr for fitted in maps]
    return STRENGTHS[int(scores.argmax())]


@pytest.mark.parametrize("noise", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(("size", "block"), [(7, 16), (64, 1), (200, 1000)])
def test_streamed_start_equals_the_start_in_memory(
    monkeypatch: pytest.MonkeyPatch, noise: float, size: int, block: int
) -> None:
    monkeypatch.setattr("pipeline.train.warm_start._BLOCK", block)
    hidden, targets = linear_problem(203, noise)
    frame = np.random.default_rng(2).normal(size=(4, 6))
    student = Student(hidden=6, width=5, compression_tokens=4)
    used = warm_start(student, statistics_of(hidden, targets, size), frame, input_norm=2.0, strength="auto")
    exact = hidden.astype(np.float64)
    deviation = float(np.sqrt(np.square(exact - exact.mean((0, 1))).sum(-1).mean()))
    soft = fit_reconstruction(exact.mean(0), deviation, frame, 2.0)
    features = soft(exact.mean(1))
    assert used == in_memory_strength(features, targets)
    [alignment] = fit_ridge(Moments.of(features, targets), [used])
    for layer, expected in ((student.reconstruction, soft), (student.alignment, alignment)):
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected.weight, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.bias.detach().numpy(), expected.bias, rtol=1e-5, atol=1e-5)


def test_only_a_bounded_number_of_rows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.warm_start.SCORED_ROWS", 8)
    monkeypatch.setattr("pipeline.train.warm_start._BLOCK", 4)
    hidden, targets = linear_problem(300)
    folds = statistics_of(hidden, targets, 11).folds()
    assert [len(features) for _, features, _ in folds] == [8] * FOLDS
    assert [moments.count for moments, _, _ in folds] == [60] * FOLDS


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_handful_of_rows_still_starts(rows: int) -> None:
    hidden, targets = linear_problem(rows)
    student = Student(hidden=6, width=5, compression_tokens=4)
    warm_start(student, statistics_of(hidden, targets), np.zeros((4, 6)), input_norm=2.0, strength="auto")
    assert all(bool(torch.isfinite(value).all()) for value in student.state_dict().values())


def test_one_row_at_one_token_is_nothing_to_fit() -> None:
    hidden, targets = linear_problem(1)
    student, alone = Student(hidden=6, width=5, compression_tokens=1), statistics_of(hidden[:, :1], targets)
    with pytest.raises(TrainingError, match=r"^warm_start\.enabled: .* 1 compression tokens of 1 training queries"):
        warm_start(student, alone, np.zeros((1, 6)), input_norm=2.0, strength="auto")


def test_rows_that_are_not_finite_are_named() -> None:
    hidden, targets = linear_problem(20)
    hidden[3, 0, 0], targets[11, 2] = np.inf, np.nan
    with pytest.raises(TrainingError, match=r"rows \[3, 11\] are not finite"):
        Statistics(4, 6).add(range(20), States.of(hidden, 4), targets)


Ids = Sequence[Sequence[int]]


class CountingQueryPass:
    """Hidden states that say which query they are of: its length, plus the token's row."""

    padded = False

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: torch.Tensor, read: int, _: Any = None
    ) -> torch.Tensor:
        lengths = torch.tensor([float(len(ids)) for ids in query_ids])
        return lengths[:, None, None] + tokens[-read:]


def test_accumulate_takes_the_chosen_rows_with_their_targets() -> None:
    lengths = [5, 1, 9, 3, 7, 2]
    queries = [[0] * length for length in lengths]
    rows = TrainingRows(list("abcdef"), queries, [[1]] * 6, np.array(lengths, np.float32)[:, None] * 10)
    student = Student(hidden=2, width=1, compression_tokens=1)
    passes = RowPasses(student, CountingQueryPass(), Accelerator(cpu=True), most_rows=3, most_tokens=None)
    statistics = accumulate(Statistics(1, 2), rows, [0, 2, 3, 5], passes)
    total = sum(moments.mean * moments.count for moments, _, _ in statistics.folds())
    np.testing.assert_allclose(total, [19.0, 19.0])
    for moments, features, targets in statistics.folds():
        np.testing.assert_allclose(features[:, :1] * 10, targets)
        np.testing.assert_allclose(moments.mean[:1] * 10, moments.target_mean)


def test_states_that_are_kept_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.states.PART_ROWS", {"cpu": 4, "cuda": 4})
    lengths = [5, 1, 9, 3, 7, 2, 8, 4, 6]
    rows = TrainingRows(list("abcdefghi"), [[0] * length for length in lengths], [[1]] * 9, np.ones((9, 1), "f4"))
    student = Student(hidden=2, width=1, compression_tokens=2)

    def read(most_rows: int) -> tuple[Statistics, list[int]]:
        query_pass, kept = FullAbove(99), Parts(tmp_path, ".npz")
        passes = RowPasses(student, query_pass, Accelerator(cpu=True), most_rows, most_tokens=None, kept=kept)
        return accumulate(Statistics(2, 2), rows, range(9), passes), query_pass.read

    first, passes = read(3)
    assert passes == [3, 1, 3, 1, 1]
    again, passes = read(2)  # cut into other passes
    assert passes == []
    np.testing.assert_array_equal(again.position_means, first.position_means)
    assert (again.spread, len(again)) == (first.spread, 9)
    for (moments, features, targets), (other, *expected) in zip(again.folds(), first.folds(), strict=True):
        np.testing.assert_array_equal(moments.scatter, other.scatter)
        np.testing.assert_array_equal(features, expected[0])
        np.testing.assert_array_equal(targets, expected[1])
    rows.query_ids[6].append(1)
    assert read(3)[1] == [3, 1]  # the part that holds another prompt


class FullAbove(CountingQueryPass):
    """Has room for so many rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.read: list[int] = []

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: torch.Tensor, read: int, _: Any = None
    ) -> torch.Tensor:
        self.read.append(len(query_ids))
        if len(query_ids) > self._rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(query_ids, tokens, read)


def test_batches_are_of_tokens_longest_first_and_halved_where_memory_is_full() -> None:
    lengths = [7, 1, 7, 7, 3, 7, 3, 3, 1, 1]
    rows = TrainingRows(list("abcdefghij"), [[0] * length for length in lengths], [[1]] * 10, np.zeros((10, 1), "f4"))
    student = Student(hidden=2, width=1, compression_tokens=1)

    def means(query_pass: CountingQueryPass) -> np.ndarray:
        passes = RowPasses(student, query_pass, Accelerator(cpu=True), most_rows=1, most_tokens=32)
        return accumulate(Statistics(1, 2), rows, range(10), passes).position_means

    roomy, tight = FullAbove(99), FullAbove(1)
    expected = means(roomy)
    np.testing.assert_allclose(expected, [[4.0, 4.0]])
    assert roomy.read == [4, 6]  # 4 x (7 + 1), 3 x (3 + 1) + 3 x (1 + 1)
    np.testing.assert_array_equal(means(tight), expected)
    assert tight.read == [4, 2] + [1] * 4 + [2] + [1] * 6
    with pytest.raises(torch.OutOfMemoryError):
        means(FullAbove(0))


@pytest.mark.slow
def test_two_processes_that_share_the_rows_give_the_start_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding of float64: the sums, the rows that strengths are scored on, the choice, the projections."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch_ranks("tests.train.shared_start_run", [str(tmp_path / "two.npz")], 2)
    shared = np.load(tmp_path / "two.npz")
    alone = {
        f"{rows} {name}": value
        for rows in (ROWS, 3)
        for name, value in run_shared_start(Accelerator(cpu=True), rows).items()
    }
    assert set(alone) == set(shared)
    assert alone[f"{ROWS} fold 4 features"].shape == (80, 6)
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


def test_the_rows_that_are_kept_whole_are_pairs() -> None:
    hidden, targets = linear_problem(23)
    features, found = statistics_of(hidden, targets).scored_rows()
    order = np.lexsort(found.T)
    expected = np.lexsort(targets.T)
    np.testing.assert_allclose(found[order], targets[expected])
    np.testing.assert_allclose(features[order], hidden.mean(1)[expected])


def test_strength_follows_the_noise() -> None:
    _, clean = linear_problem()
    hidden, noisy = linear_problem(noise=12.0)
    chosen = [choose_strength(statistics_of(hidden, targets).folds(), IDENTITY) for targets in (noisy, clean)]
    assert chosen[0] > chosen[1]


def test_frame_rows_are_the_end_of_the_prompt() -> None:
    words = np.arange(8.0).reshape(4, 2)
    assert frame_rows(words, [0, 3, 1], 2).tolist() == [[6, 7], [2, 3]]
    assert frame_rows(words, [3], 2).tolist() == [[3, 4], [6, 7]]
    assert frame_rows(words, [], 2).tolist() == [[3, 4], [3, 4]]


@pytest.mark.parametrize("tokens", [1, 4])
def test_warm_start_begins_at_the_frame_and_keeps_the_embedding(tokens: int) -> None:
    hidden, targets = linear_problem()
    hidden = hidden[:, :tokens] if tokens > 1 else hidden.mean(1, keepdims=True)
    hidden = hidden + 5 * np.eye(6, dtype=np.float32)[:tokens]
    frame = np.random.default_rng(2).normal(0.1, 1.0, (tokens, 6)).astype(np.float32)
    student = Student(hidden=6, width=5, compression_tokens=tokens)
    warm_start(student, statistics_of(hidden, targets, 32), frame, input_norm=2.0, strength=1e-6)
    with torch.no_grad():
        soft = student.soft_prompts(torch.from_numpy(hidden))
        embeddings = student.embedding(soft).numpy()
    np.testing.assert_allclose(soft.mean(0).numpy(), frame, atol=1e-4)
    np.testing.assert_allclose(embeddings, targets, atol=1e-2)


def test_positions_that_are_alike_are_not_forced_apart() -> None:
    """They differ by the noise of a sample; a map that turned it into the frame would drown every feature."""
    hidden, _ = linear_problem()
    apart = hidden + 5 * np.eye(6, dtype=np.float32)[:4]
    frame = np.random.default_rng(2).normal(size=(4, 6))
    largest = {}
    for name, states in (("alike", hidden), ("apart", apart)):
        statistics = statistics_of(states, np.zeros((200, 5), np.float32))
        fitted = fit_reconstruction(statistics.position_means, statistics.spread, frame, input_norm=2.0)
        largest[name] = np.linalg.norm(fitted.weight, ord=2)
    assert largest["alike"] < largest["apart"]


def test_one_token_varies_by_half_the_norm() -> None:
    hidden, targets = linear_problem()
    statistics = statistics_of(hidden[:, :1], targets)
    fitted = fit_reconstruction(statistics.position_means, statistics.spread, np.zeros((1, 6)), input_norm=3.0)
    varied = np.linalg.norm(fitted(hidden[:, 0]), axis=-1)
    np.testing.assert_allclose(np.sqrt(np.square(varied).mean()), 1.5, rtol=1e-5)
