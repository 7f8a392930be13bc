"""Embeddings at a response share, worked out by hand for two dimensions."""

import math

import pytest
import torch

from pipeline.encoder.folder.config import ResponseForm
from pipeline.encoder.head import EmbeddingHead, Reading
from pipeline.encoder.student import Student

FEATURES = torch.tensor([[3.0, 1.0], [5.0, 3.0]])


def student() -> Student:
    """Predicts the first dimension of the mean hidden state; its soft prompts are the hidden states."""
    made = Student(hidden=2, width=1, compression_tokens=2)
    with torch.no_grad():
        made.reconstruction.weight.copy_(torch.eye(2))
        made.reconstruction.bias.zero_()
        made.alignment.weight.copy_(torch.tensor([[1.0, 0.0]]))
        made.alignment.bias.zero_()
    return made


def tokens_of(*means: tuple[float, float]) -> torch.Tensor:
    """Hidden states `[B, 2, 2]` of two tokens around each mean."""
    centre = torch.tensor(means)
    return torch.stack([centre - 0.5, centre + 0.5], dim=1)


def test_a_reading_is_standardised_over_the_rows_it_was_fitted_on() -> None:
    reading = Reading.fit(student(), FEATURES)
    assert reading.mean.tolist() == [4, 2]
    assert reading.scale.tolist() == [1, 1]  # both dimensions deviate by 1
    assert reading.lengths.tolist() == pytest.approx(
        [4, math.sqrt(2)]
    )  # predictions 3 and 5; readings (-1, -1), (1, 1)


def test_a_dimension_that_does_not_vary_is_left_at_zero() -> None:
    reading = Reading.fit(student(), torch.tensor([[3.0, 7.0], [5.0, 7.0]]))
    assert reading.scale.tolist() == [1, 0]


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_the_inner_product_weighs_prediction_and_reading(share: float) -> None:
    head = EmbeddingHead(student(), share, Reading.fit(student(), FEATURES))
    with torch.no_grad():
        first, second = head(tokens_of((6.0, 2.0), (2.0, 5.0)))
    assert head.width == len(first) == 3
    torch.testing.assert_close(first[0], torch.tensor(share * 6 / 4 * math.sqrt(2)))
    torch.testing.assert_close(first[1:], torch.tensor([2.0, 0.0]) * (1 - share))
    # Predictions 6 and 2 over their mean length 4, times that of readings; readings (2, 0) and (-2, 3).
    expected = share**2 * (6 * 2) / 16 * 2 + (1 - share) ** 2 * (2 * -2)
    assert float(first @ second) == pytest.approx(expected, rel=1e-5)


def test_the_cosine_is_the_weighted_one_of_rows_of_mean_length() -> None:
    head = EmbeddingHead(student(), 0.3, Reading.fit(student(), FEATURES))
    with torch.no_grad():
        rows = head(tokens_of((4.0, 4.0), (4.0, 0.0)))  # predictions of mean length; readings (0, 2) and (0, -2)
    prediction, reading = 0.3**2 * 2, 0.7**2 * 4
    cosine = (prediction - reading) / (prediction + reading)
    assert float(torch.cosine_similarity(rows[0], rows[1], dim=0)) == pytest.approx(cosine)


def test_added_in_one_space_both_parts_keep_their_weights() -> None:
    made = Student(hidden=2, width=2, compression_tokens=2)  # predicts the states, turned by a right angle
    with torch.no_grad():
        for layer, weight in ((made.reconstruction, torch.eye(2)), (made.alignment, torch.tensor([[0.0, -1], [1, 0]]))):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    reading = Reading(torch.tensor([1.0, 0]), torch.ones(2), torch.tensor([4.0, 2]))
    head = EmbeddingHead(made, 0.25, reading, form="added")
    assert head.width == 2
    with torch.no_grad():
        found = head(tokens_of((3.0, 5.0)))
    # A quarter of (-5, 3) at half its length, three quarters of (3, 5) less (1, 0).
    assert found.tolist() == [[0.25 * -2.5 + 0.75 * 2, 0.25 * 1.5 + 0.75 * 5]]


def test_a_reading_is_mapped_into_the_space_of_the_targets_before_it_is_added() -> None:
    reading = Reading.fit(student(), FEATURES)  # less (4, 2), deviations of 1, predictions of mean length 4
    weight, bias = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([6.0]).double()
    mapped = reading.with_map(weight, bias, FEATURES)
    # Readings (-1, -1) and (1, 1) become -3 + 6 and 3 + 6.
    assert mapped.lengths.tolist() == pytest.approx([4, math.sqrt(2), 6])
    with torch.no_grad():
        found = EmbeddingHead(student(), 0.25, mapped, form="added")(tokens_of((6.0, 1.0)))
        beside = EmbeddingHead(student(), 0.25, mapped)(tokens_of((6.0, 1.0)))
    # A quarter of the prediction 6, at 6 / 4 of its length; three quarters of 1 x 2 + 2 x -1 + 6.
    assert found.tolist() == [[pytest.approx(0.25 * 6 * 6 / 4 + 0.75 * 6)]]
    # The map changes nothing of what stands beside the prediction.
    torch.testing.assert_close(beside[0], torch.tensor([0.25 * 6 * math.sqrt(2) / 4, 0.75 * 2, 0.75 * -1]))


def test_a_decorrelated_reading_stands_beside_the_prediction_at_the_length_that_it_then_has() -> None:
    reading = Reading.fit(student(), FEATURES)  # less (4, 2), deviations of 1, predictions of mean length 4
    turned = reading.with_map(torch.tensor([[0.0, 3], [3, 0]]).double(), torch.zeros(2).double(), FEATURES)
    assert turned.lengths.tolist() == pytest.approx([4, math.sqrt(2), 3 * math.sqrt(2)])
    with torch.no_grad():
        found = EmbeddingHead(student(), 0.25, turned, decorrelated=True)(tokens_of((6.0, 1.0)))
    # The reading (2, -1) becomes (-3, 6); the prediction is 6.
    expected = torch.tensor([0.25 * 6 * 3 * math.sqrt(2) / 4, 0.75 * -3, 0.75 * 6])
    torch.testing.assert_close(found[0], expected)


FORMS = [(0.0, "beside"), (0.3, "beside"), (0.3, "added"), (1.0, "added"), (0.3, "mapped"), (1.0, "mapped")]
FORMS += [(0.3, "decorrelated")]


@pytest.mark.parametrize(("share", "form"), FORMS)
def test_the_composed_map_is_the_head(share: float, form: str) -> None:
    made = Student(hidden=5, width=5 if form == "added" else 3, compression_tokens=2)
    hidden = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    reading = Reading.fit(made, hidden.mean(1))
    decorrelated, width = form == "decorrelated", 5 if form == "decorrelated" else 3
    if form in ("mapped", "decorrelated"):
        draw = torch.Generator().manual_seed(1)
        weight, bias = torch.randn(width, 5, generator=draw).double(), torch.randn(width, generator=draw).double()
        reading = reading.with_map(weight, bias, hidden.mean(1))
    joined: ResponseForm = "beside" if form in ("beside", "decorrelated") else "added"
    head = EmbeddingHead(made, share, reading, form=joined, decorrelated=decorrelated)
    weight, bias = head.composed()
    assert tuple(weight.shape) == (head.width, 5)
    with torch.no_grad():
        torch.testing.assert_close((hidden.mean(1).double() @ weight.T + bias).float(), head(hidden))


def test_a_share_of_one_is_the_prediction_as_it_is_and_none_the_plain_mean() -> None:
    hidden = tokens_of((6.0, 2.0))
    with torch.no_grad():
        assert EmbeddingHead(student())(hidden).tolist() == [[6]]
        assert EmbeddingHead(student(), 0.0)(hidden).tolist() == [[6, 2]]
