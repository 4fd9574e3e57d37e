"""Where an energy's cheap part ends and its model begins."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.energy.coordinates import CoordinateEnergy, gaussian_of
from pyro_forget.energy.gaussian import GaussianEnergy
from pyro_forget.energy.protocol import Energy, FunctionEnergy
from pyro_forget.energy.variational import MODEL_PREFIX, VariationalEnergy, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params


@dataclass(frozen=True)
class WeightSpace:
    """F(γ, S) = prior(γ) + Σ likelihood(weights(γ), batch).

    Derivatives of the likelihood, which cost, are taken in what the model is run with; those of the other two, which
    are a formula for each entry, by autograd.

    Attributes:
        weights: γ to what the model sees: draws, Gaussians, learned parameters; the same for all batches.
        likelihood: Σ h over the batch's rows as a function of the weights, scalar.
        prior: scalar.
    """

    weights: Callable[[Params], Params]
    likelihood: Callable[[Params, Batch], Tensor]
    prior: Callable[[Params], Tensor]


def weight_space(energy: Energy) -> WeightSpace | None:
    """The parts of an energy; the weights are γ itself where it has no Gaussian. None for one written by hand."""
    if isinstance(energy, FunctionEnergy):
        return None
    if isinstance(energy, CoordinateEnergy):
        return _of_gaussian(energy, energy.gaussian, gaussian_of)
    if isinstance(energy, VariationalEnergy) and energy.gaussian is not None:
        return _of_gaussian(energy, energy.gaussian, energy.read)
    return WeightSpace(lambda params: params, energy.share, energy.prior)


def _of_gaussian(energy: Energy, gaussian: GaussianEnergy, read: Callable[[Params], Gaussian]) -> WeightSpace:
    def weights(params: Params) -> Params:
        learned = {name: value for name, value in params.items() if name.startswith(MODEL_PREFIX)}
        return gaussian.drawn(read(params)) | learned

    def likelihood(weights: Params, batch: Batch) -> Tensor:
        return gaussian.with_model_params(model_part(weights)).share_at(weights, batch)

    return WeightSpace(weights, likelihood, energy.prior)
