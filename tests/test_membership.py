"""The threshold attack, nearest-neighbour divergences and mean predictions against brute force and closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_forget.evaluation import error_rate, neighbour_kl, predictive_l1, threshold_attack, true_class_probability


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_threshold_is_the_best_of_all() -> None:
    retained, test, erased = (
        (2 * numbers(n, seed=n) + shift).sigmoid() for n, shift in ((40, 1.0), (30, 0.0), (20, -2))
    )
    found = threshold_attack(erased, retained, test)
    every = [
        0.5 * (float((retained >= t).double().mean()) + float((test < t).double().mean()))
        for t in torch.linspace(0, 1, 5001)
    ]
    assert found.accuracy == pytest.approx(max(every), abs=1e-12)
    assert found.erased_as_strangers == float((erased < found.threshold).double().mean())
    assert found.erased_as_strangers > found.test_as_strangers


def test_members_that_cannot_be_told_leave_chance() -> None:
    same = torch.full((10,), 0.7)
    assert threshold_attack(same, same, same).accuracy == 0.5


@pytest.mark.parametrize("bad", [torch.tensor([1.2]), torch.tensor([]), torch.tensor([float("nan")])])
def test_what_is_no_probability_is_refused(bad: Tensor) -> None:
    good = torch.tensor([0.5])
    with pytest.raises(ValueError, match="`erased` must be probabilities"):
        threshold_attack(bad, good, good)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_neighbours_find_the_divergence_of_two_gaussians(neighbours: int) -> None:
    """From the narrow one to the wide one, where the wide one has draws near by; the other direction is larger."""
    narrow = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    wide = MultivariateNormal(torch.tensor([1.5, 0.0]), 2.0 * torch.eye(2))
    a = numbers(4000, 2) @ narrow.scale_tril.T
    b = wide.loc + numbers(4000, 2, seed=1) @ wide.scale_tril.T
    forward = float(kl_divergence(narrow, wide))
    assert float(neighbour_kl(a, b, neighbours)) == pytest.approx(forward, rel=0.1)
    assert float(neighbour_kl(b, a, neighbours)) > 1.25 * forward


def test_draws_that_have_no_divergence_are_refused() -> None:
    with pytest.raises(ValueError, match="same d"):
        neighbour_kl(numbers(5, 2), numbers(5, 3))
    with pytest.raises(ValueError, match="more draws"):
        neighbour_kl(numbers(5, 2), numbers(5, 2), 5)
    with pytest.raises(ValueError, match="coincide"):
        neighbour_kl(numbers(5, 2), numbers(5, 2))


def test_mean_predictions_beside_labels_and_another() -> None:
    a = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.8, 0.2]]]).log()
    b = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    labels = torch.tensor([0, 0])
    torch.testing.assert_close(true_class_probability(a, labels), torch.tensor([0.7, 0.5]))
    assert float(error_rate(a, torch.tensor([1, 0]))) == 0.5
    assert float(predictive_l1(a, b)) == pytest.approx(0.5 * (0.4 + 0.0))
    with pytest.raises(ValueError, match="must agree"):
        predictive_l1(a, b[:, :1])
    assert math.isclose(float(true_class_probability(b, labels)[0]), 0.5)
