"""The tilted retained energy: its minimiser, its first Newton step, its sums."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.energy import FunctionEnergy, VariationalEnergy
from pyro_forget.guides import MeanField
from pyro_forget.params import Params, axpy, dot, flatten, subtract
from pyro_forget.posterior import VariationalPosterior
from pyro_forget.tilt import TiltedEnergy, total_and_gradient
from tests import fits
from tests.oracles import dense_gradient, dense_hessian, finite_difference


@dataclass(frozen=True)
class Case:
    """A posterior that is not quite one, under one noise."""

    posterior: VariationalPosterior
    energy: VariationalEnergy
    data: Data

    def tilted(self, ids: list[int], data: Data | None = None) -> TiltedEnergy:
        erased, retained = (data or self.data).split(ids)
        return TiltedEnergy.of(self.energy, self.posterior.params, erased, retained)

    def elsewhere(self, seed: int = 3, size: float = 0.1) -> Params:
        return {name: v + size * fits.normal(seed, *v.shape) for name, v in self.posterior.params.items()}


@pytest.fixture
def case() -> Case:
    model, data = fits.logistic()
    posterior = fits.fitted(model, MeanField(model), data, num_steps=30, polish=None)
    return Case(posterior, posterior.energy.with_noise(7, 8), data)


def test_without_a_request_the_origin_is_the_minimum(case: Case) -> None:
    """Exactly, however far the fit was from its own minimum: the gradient is the difference of equal numbers."""
    _, gradient = total_and_gradient(case.energy, case.posterior.params, case.data)
    assert float(flatten(gradient).norm()) > 1
    value, tilted = case.tilted([]).value_and_gradient(case.posterior.params)
    assert value == case.tilted([]).at_origin
    assert all(bool((entry == 0).all()) for entry in tilted.values())


def test_the_force_at_the_origin_is_the_request(case: Case) -> None:
    tilted = case.tilted([1, 5, 9])
    _, gradient = tilted.value_and_gradient(case.posterior.params)
    erased = case.data.split([1, 5, 9])[0]

    def share(params: Params) -> Tensor:
        return sum((case.energy.share(params, batch) for batch in erased.batches()), torch.zeros(()))

    torch.testing.assert_close(-flatten(gradient), dense_gradient(share, case.posterior.params))
    torch.testing.assert_close(flatten(tilted.share), -flatten(gradient))


def test_the_first_newton_step_is_the_influence_function(case: Case) -> None:
    """H⁻¹∇h of the retained rows: Fu, He and Tao (2021), section 4."""
    tilted = case.tilted([1, 5, 9])
    origin = case.posterior.params
    hessian = dense_hessian(lambda params: case.energy.total(params, tilted.retained), origin)
    _, gradient = tilted.value_and_gradient(origin)
    newton = -torch.linalg.solve(hessian, flatten(gradient))
    torch.testing.assert_close(newton, torch.linalg.solve(hessian, flatten(tilted.share)))


def test_value_gradient_and_the_untilted_energy(case: Case) -> None:
    tilted, there = case.tilted([1, 5, 9]), case.elsewhere()
    value, gradient = tilted.value_and_gradient(there)
    untilted = float(case.energy.total(there, tilted.retained).detach())
    along = float(dot(tilted.tilt, subtract(there, case.posterior.params)))
    assert value == pytest.approx(tilted.value(there)) == pytest.approx(untilted - along)
    assert tilted.untilted(value, there) == pytest.approx(untilted)
    direction = case.elsewhere(seed=4, size=1.0)

    def energy(params: Params) -> Tensor:
        return torch.tensor(tilted.value(params))

    expected = float(finite_difference(energy, there, direction))
    assert float(dot(gradient, direction)) == pytest.approx(expected, rel=1e-6)


def test_the_tilt_is_the_gradient_over_all_data(case: Case) -> None:
    _, whole = total_and_gradient(case.energy, case.posterior.params, case.data)
    for ids in ([0], list(range(50))):
        torch.testing.assert_close(flatten(case.tilted(ids).tilt), flatten(whole))


def test_batches_do_not_matter(case: Case) -> None:
    there = case.elsewhere()
    whole, parts = case.tilted([1, 5, 9]), case.tilted([1, 5, 9], case.data.with_batch_size(7))
    assert whole.at_origin == pytest.approx(parts.at_origin)
    assert whole.value(there) == pytest.approx(parts.value(there))
    torch.testing.assert_close(flatten(whole.tilt), flatten(parts.tilt))


def test_an_energy_by_hand_brings_its_prior_once() -> None:
    """It knows it only together with a batch."""

    def share(params: Params, batch: Batch) -> Tensor:
        return (params["p"] - batch.args[0]).square().sum()

    energy = FunctionEnergy(lambda params, batch: params["p"].square() + share(params, batch), share)
    data = Data(torch.arange(7.0)).with_batch_size(2)
    value, gradient = total_and_gradient(energy, {"p": torch.tensor(1.0)}, data)
    assert value == pytest.approx(1 + float((1 - torch.arange(7.0)).square().sum()))
    assert float(gradient["p"]) == pytest.approx(2 + 2 * float((1 - torch.arange(7.0)).sum()))


def test_a_step_out_of_the_support_is_infinitely_bad(case: Case) -> None:
    """Not an error: a line search steps there and turns back."""

    def share(params: Params, batch: Batch) -> Tensor:
        return batch.args[0].sum() * params["p"].log()

    energy = FunctionEnergy(lambda params, batch: params["p"].square() + share(params, batch), share)
    data = Data(-torch.ones(3))
    tilted = TiltedEnergy.of(energy, {"p": torch.tensor(1.0)}, *data.split([0]))
    assert tilted.value({"p": torch.tensor(-1.0)}) == math.inf
    assert math.isfinite(tilted.value(axpy(0.5, {"p": torch.tensor(1.0)}, {"p": torch.tensor(1.0)})))


def test_an_origin_without_density_is_an_error() -> None:
    energy = FunctionEnergy(lambda params, batch: params["p"].log(), lambda params, batch: params["p"])
    data = Data(torch.ones(3))
    with pytest.raises(ValueError, match="The energy is nan"):
        TiltedEnergy.of(energy, {"p": torch.tensor(-1.0)}, *data.split([0]))
