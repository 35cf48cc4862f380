"""The loss terms against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sd_erase.erasure.losses import consistency, forgetting, prediction_divergence, relative_error, retention, spread


def test_forgetting_is_the_mean_similarity_of_matching_pairs() -> None:
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert forgetting(images, texts).item() == pytest.approx((1.0 + 0.96) / 2)  # eq. 2; 0.6 * 0.8 + 0.8 * 0.6
    wide = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
    assert forgetting(*wide).item() == pytest.approx(0.98)  # the sum runs over dimensions, the mean over pairs


def test_retention_is_the_symmetric_cross_entropy() -> None:
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits 2 * [[1, 0.6], [0, 0.8]]: rows are images, columns texts
    rows = [math.log(1 + math.exp(1.2 - 2.0)), math.log(1 + math.exp(0.0 - 1.6))]
    columns = [math.log(1 + math.exp(0.0 - 2.0)), math.log(1 + math.exp(1.2 - 1.6))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert retention(images, texts, torch.tensor(2.0)).item() == pytest.approx(expected)


def test_retention_is_log_of_the_batch_where_nothing_is_told_apart() -> None:
    same = torch.ones(5, 1)
    assert retention(same, same, torch.tensor(10.0)).item() == pytest.approx(math.log(5))


def test_consistency_is_the_divergence_from_the_original() -> None:
    original, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    # p = (1/2, 1/2), q = (3/4, 1/4)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert consistency(original, student).item() == pytest.approx(expected)
    assert consistency(original, original).item() == pytest.approx(0.0)
    assert consistency(student, original).item() != pytest.approx(expected)  # it has a direction


def test_consistency_is_averaged_over_the_batch() -> None:
    original, student = torch.zeros(3, 2), torch.tensor([[math.log(3.0), 0.0]] * 3)
    assert consistency(original, student).item() == pytest.approx(consistency(original[:1], student[:1]).item())


def test_consistency_is_over_the_dimensions_of_each_embedding() -> None:
    original, student = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.5, 1.0, 0.0]])

    def softmax(row: torch.Tensor) -> list[float]:
        total = sum(math.exp(value) for value in row.tolist())
        return [math.exp(value) / total for value in row.tolist()]

    expected = 0.0
    for before, after in zip(original, student, strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(softmax(before), softmax(after), strict=True)) / 2
    assert consistency(original, student).item() == pytest.approx(expected, rel=1e-5)


def test_prediction_divergence_goes_both_ways() -> None:
    original = torch.zeros(2, 2)
    student = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])

    def divergence(q: float) -> float:
        return 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))

    # rows: (3/4, 1/4) and (1/2, 1/2); columns: (3/4, 1/4) and (1/2, 1/2)
    assert prediction_divergence(original, student).item() == pytest.approx(divergence(0.75) / 2, rel=1e-5)
    wide, moved = torch.zeros(1, 3), torch.tensor([[math.log(2.0), 0.0, 0.0]])
    # one image, three texts: a row of (1/2, 1/4, 1/4), and three columns that hold nothing but themselves
    expected = sum(1 / 3 * math.log(1 / 3 / q) for q in (0.5, 0.25, 0.25)) / 2
    assert prediction_divergence(wide, moved).item() == pytest.approx(expected, rel=1e-5)
    assert prediction_divergence(wide.T, moved.T).item() == pytest.approx(expected, rel=1e-5)


def test_prediction_divergence_is_each_side_averaged_over_its_own_queries() -> None:
    original, student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])

    def mean_divergence(before: list[list[float]], after: list[list[float]]) -> float:
        total = 0.0
        for rows in zip(before, after, strict=True):
            p, q = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in rows)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return total / len(before)

    both = mean_divergence(original.tolist(), student.tolist()) + mean_divergence(original.T.tolist(), student.T.tolist())
    assert prediction_divergence(original, student).item() == pytest.approx(both / 2, rel=1e-5)


def test_spread_is_the_variance_about_the_mean_state() -> None:
    states = torch.tensor([[[0.0, 10.0], [2.0, 10.0]], [[0.0, 14.0], [2.0, 14.0]]])  # each dimension about its own mean
    assert spread(states).item() == pytest.approx((1.0 + 4.0) / 2)
    assert spread(torch.ones(2, 3, 4)).item() == pytest.approx(1e-8)  # never a division by zero
    assert relative_error(states + 1.0, states).item() == pytest.approx(1.0 / 2.5)
    assert relative_error(states + 1.0, states, over=torch.tensor(0.5)).item() == pytest.approx(2.0)


def test_relative_error_is_one_for_the_mean_and_zero_for_the_target() -> None:
    target = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    assert relative_error(target, target).item() == 0.0
    mean = target.mean((0, 1), keepdim=True).expand_as(target)
    assert relative_error(mean, target).item() == pytest.approx(1.0)
    assert relative_error(100 * mean, 100 * target).item() == pytest.approx(1.0)  # whatever the layer's scale


@pytest.mark.parametrize("term", ["forgetting", "retention", "consistency", "relative_error"])
def test_every_term_has_a_gradient_that_lowers_it(term: str) -> None:
    generator = torch.Generator().manual_seed(1)
    fixed = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    free = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1).requires_grad_(True)
    value = {
        "forgetting": lambda x: forgetting(fixed, x),
        "retention": lambda x: retention(fixed, x, torch.tensor(5.0)),
        "consistency": lambda x: consistency(fixed, x),
        "relative_error": lambda x: relative_error(x[None], fixed[None]),
    }[term]
    before = value(free)
    before.backward()
    assert value(free - 0.01 * free.grad) < before
