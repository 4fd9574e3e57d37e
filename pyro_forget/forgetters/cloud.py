"""A sampled posterior seen as one matrix of draws, with its log densities and their derivatives there."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy import SampledEnergy, gradient_over, value_and_gradient
from pyro_forget.importance import normalise, systematic_resample
from pyro_forget.outcome import Evidence
from pyro_forget.params import Params
from pyro_forget.posterior import Posterior, SampledPosterior

_NUMBERS_AT_ONCE = 1 << 19  # draws times dimensions evaluated in one pass
_ROWS_AT_ONCE = 1 << 17  # draws times rows: beyond, what a pass makes fits into no cache, and takes twice as long
_DRAWS_FOR_COVARIANCE = 5  # a dimension; with fewer only standard deviations are known

BLIND_SPOT = (
    "The weights compare the moved draws with the density that the draws were meant to follow: they cannot see a "
    "sampler's own bias, nor a mode that no draw has visited."
)


@dataclass(frozen=True)
class Cloud:
    """The draws of a posterior in unconstrained space, one row each, chain after chain."""

    posterior: SampledPosterior

    @cached_property
    def matrix(self) -> Tensor:
        """(draw, d), float64."""
        return self._flat({name: value.detach() for name, value in self.posterior.params.items()})

    @property
    def log_weights(self) -> Tensor:
        """(draw,), normalised; equal where the posterior has none."""
        weights = self.posterior.log_weights
        if weights is None:
            return torch.full_like(self.matrix[:, 0], -math.log(len(self.matrix)))
        return normalise(weights.detach()).flatten().to(self.matrix.device)

    def params(self, matrix: Tensor, lead: tuple[int, ...] | None = None) -> Params:
        """Rows as a cloud (1, draw, *site), or with the leading shape that is given."""
        lead = (1, len(matrix)) if lead is None else lead
        columns = self._columns()
        pieces = matrix.split([value[0, 0].numel() for value in columns.values()], dim=-1)
        return {
            name: piece.reshape(*lead, *self.posterior.params[name].shape[2:]).to(value.dtype)
            for (name, value), piece in zip(columns.items(), pieces, strict=True)
        }

    def shift(self, vector: Tensor) -> Params:
        """A vector (d,) as a common shift of all draws, each site of its own shape."""
        return {name: value[0] for name, value in self.params(vector[None], (1,)).items()}

    def vector(self, shift: Params) -> Tensor:
        """The inverse of `shift`, float64."""
        return torch.cat([shift[name].detach().double().reshape(-1) for name in self._columns()])

    def log_joint(self, matrix: Tensor, data: Data) -> Tensor:
        """Log p(θ, data) of each row, log-Jacobian included; (draw,), nats."""
        return self._by_rows(lambda rows: self.posterior.log_joint(self.params(rows), data), matrix, data)

    def log_likelihood(self, data: Data) -> Tensor:
        """Log p(data | θ) of each draw, (draw,), nats."""
        energy = self.posterior.energy

        def of(rows: Tensor) -> Tensor:
            cloud = self.params(rows)
            start = torch.zeros(1, len(rows), dtype=torch.float64, device=rows.device)
            return data.reduce(lambda batch: energy.log_likelihood_of(cloud, batch).double().sum(-1), start=start)

        return self._by_rows(of, self.matrix, data)

    def log_joint_and_gradient(self, matrix: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        """(log p(θ, data), its gradient) of each row: shapes (draw,) and (draw, d), float64, nats."""
        found = [self._with_gradient(rows, data) for rows in _chunks(matrix, data)]
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])

    def force(self, data: Data) -> Tensor:
        """Σ ∇h at each draw: minus the gradient of its log likelihood of `data`, (draw, d)."""
        energy = self.posterior.energy
        return self._gradients(lambda cloud: gradient_over(energy.share, cloud, data)[1], data)

    def mean_gradient(self, data: Data) -> Tensor:
        """The gradient of F(γ, data) in the common shift γ, at 0, over all draws; (d,)."""
        prior = self._gradients(lambda cloud: value_and_gradient(self.posterior.energy.prior, cloud)[1], data)
        return self.log_weights.exp() @ (prior + self.force(data))

    def mean_energy(self, num_draws: int) -> SampledEnergy:
        """The energy of some of the draws as a function of their common shift."""
        chosen = systematic_resample(self.log_weights, min(num_draws, len(self.matrix)))
        return self.posterior.energy.shifted(self.params(self.matrix[chosen]))

    def representatives(self, count: int, among: slice = slice(None)) -> Tensor:
        """Some of the draws, moved until their mean and covariance are those of all that they are `among`; (row, d)."""
        matrix, weights = self.matrix[among], normalise(self.log_weights[among]).exp()
        if count >= len(matrix) and self.posterior.log_weights is None:
            return matrix
        chosen = matrix[systematic_resample(weights.log(), count)]
        mean, centred = weights @ matrix, chosen - chosen.mean(0)
        whole = torch.linalg.cholesky_ex((weights * (matrix - mean).T) @ (matrix - mean))
        part = torch.linalg.cholesky_ex(centred.T @ centred / count)
        if bool(whole.info) or bool(part.info):
            return mean + centred
        return mean + torch.linalg.solve_triangular(part.L, centred.T, upper=False).T @ whole.L.T

    def edited(self, matrix: Tensor, ids: Tensor, log_weights: Tensor | None) -> SampledPosterior:
        """The posterior of moved rows in chain order."""
        lead = self.posterior.shape
        weights = None if log_weights is None else log_weights.reshape(lead)
        return self.posterior.edited(self.params(matrix, lead), ids, weights)

    def step_norm(self, matrix: Tensor) -> dict[str, float]:
        """How far the draws moved, by site: the root mean square over the draws of the Euclidean length."""
        moved = self.params(matrix - self.matrix)
        return {name: float(value.double().norm()) / math.sqrt(len(matrix)) for name, value in moved.items()}

    def _columns(self) -> Params:
        """Sites of at least one number; a model may have empty ones."""
        return {name: value for name, value in self.posterior.params.items() if value.numel()}

    def _flat(self, cloud: Params) -> Tensor:
        pieces = [cloud[name].double() for name in self._columns()]
        return torch.cat([piece.reshape(piece.shape[0] * piece.shape[1], -1) for piece in pieces], 1)

    def _with_gradient(self, rows: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        energy = self.posterior.energy
        leaves = {name: value.detach().requires_grad_(True) for name, value in self.params(rows).items()}

        def of(values: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
            return values.detach().double().flatten(), self._flat(dict(zip(leaves, found, strict=True)))

        start = of(energy.log_prior(leaves))
        return data.reduce(lambda batch: of(energy.log_likelihood_of(leaves, batch).double().sum(-1)), start=start)

    def _gradients(self, gradient: Callable[[Params], Params], data: Data) -> Tensor:
        """Of each draw, from the gradient of a mean over draws."""
        parts = _chunks(self.matrix, data)
        return torch.cat([len(rows) * self._flat(gradient(self.params(rows))) for rows in parts])

    def _by_rows(self, function: Callable[[Tensor], Tensor], matrix: Tensor, data: Data) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(rows).double().flatten() for rows in _chunks(matrix, data)])


def _chunks(matrix: Tensor, data: Data) -> tuple[Tensor, ...]:
    """Draws that are evaluated in one pass."""
    rows = max(1, min(data.batch_size, data.num_data))
    return matrix.split(max(1, min(_NUMBERS_AT_ONCE // max(1, matrix.shape[1]), _ROWS_AT_ONCE // rows)))


@dataclass(frozen=True)
class Request:
    """What is to be forgotten; `log_source` is the log joint of all data at the draws."""

    cloud: Cloud
    erased: Data
    retained: Data
    log_source: Tensor

    def log_target(self, draws: Tensor) -> Tensor:
        """The log joint of the retained data at any draws, (draw,)."""
        return self.cloud.log_joint(draws, self.retained)

    @cached_property
    def forces(self) -> Tensor:
        """∇h of the erased data at each draw, (draw, d)."""
        return self.cloud.force(self.erased)

    @cached_property
    def force(self) -> Tensor:
        """Its mean over the draws, (d,)."""
        return self.cloud.log_weights.exp() @ self.forces

    @cached_property
    def before(self) -> Tensor:
        """The log joint of the retained data at the draws, (draw,)."""
        return self.log_target(self.cloud.matrix)

    @cached_property
    def tilt(self) -> Tensor:
        """∇F(0, all data) of the common shift, (d,): what keeps the input in its place if nothing is erased."""
        return self.cloud.mean_gradient(self.retained) + self.force

    def tilted_fall(self, shift: Tensor, log_target: Tensor) -> float:
        """φ(0) − φ(shift) in nats, φ(γ) = F(γ, retained) − ⟨tilt, γ⟩ and F the mean over the draws."""
        return float(self.cloud.log_weights.exp() @ (log_target - self.before) + self.tilt @ shift)


@dataclass(frozen=True)
class Move:
    """Moved draws (draw, d), their log weights (draw,) or None, and what to say of them."""

    matrix: Tensor
    log_weights: Tensor | None
    evidence: Evidence


def cloud_of(posterior: Posterior, method: str) -> Cloud:
    """The draws of a sampled posterior.

    Raises:
        ValueError: it is another kind of posterior.
    """
    if not isinstance(posterior, SampledPosterior):
        raise ValueError(
            f"{method} edits draws, got a {type(posterior).__name__}: "
            "pass a SampledPosterior, or forget by influence instead."
        )
    return Cloud(posterior)


def spread_factor(matrix: Tensor, log_weights: Tensor) -> Tensor:
    """Cholesky factor of the draws' weighted covariance, or their standard deviations (d,) where draws are few."""
    weights = log_weights.exp()
    centred = matrix - weights @ matrix
    deviations = (weights @ centred.square()).sqrt()
    if len(matrix) >= _DRAWS_FOR_COVARIANCE * matrix.shape[1]:
        factor, failed = torch.linalg.cholesky_ex((weights * centred.T) @ centred)
        if not bool(failed):
            return factor
    # A single draw, or a coordinate that never moved, says nothing of its scale.
    return torch.where(deviations > 0, deviations, torch.ones_like(deviations))
