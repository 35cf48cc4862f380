"""The loss terms against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sd_erase.erasure.losses import consistency, forgetting, relative_error, retention


def test_forgetting_is_the_mean_similarity_of_matching_pairs() -> None:
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert forgetting(images, texts).item() == pytest.approx((1.0 + 0.96) / 2)  # eq. 2; 0.6 * 0.8 + 0.8 * 0.6


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
