"""−ELBO of a Gaussian guide in the Gaussian's own coordinates: the energy that forgetting by influence works on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.effects.noise import Noise, Quadrature, RowNoise
from pyro_forget.effects.program import Program, Run, over_draws, quiet
from pyro_forget.effects.run import Answers
from pyro_forget.gaussian import Gaussian, GaussianGuide
from pyro_forget.params import Params


@dataclass(frozen=True)
class Conjugate:
    """A site whose prior is Normal with parameters that no latent changes: its cross-entropy is closed-form."""

    loc: Tensor
    scale: Tensor

    def cross_entropy(self, loc: Tensor, variance: Tensor) -> Tensor:
        """E_q[−log p] of q = N(loc, variance), scalar, nats."""
        gap = loc - self.loc
        weight = self.scale.reciprocal().square()
        return 0.5 * ((gap.square() + variance) * weight).sum() + self.scale.log().sum() + 0.5 * loc.numel() * _LOG_2PI


_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianEnergy:
    """E_q[−log p(data, θ)] − H[q] of a Gaussian q.

    Attributes:
        program: the model.
        view: between unconstrained values and latents.
        ids: of the posterior's rows, int64; noise that belongs to a row follows its id.
        noise: pinned.
        conjugate: sites whose prior term is closed-form.
        local: sites that the model treats as distributions (local reparametrisation).
        row_shapes: shape of the auxiliary noise of one row, by site; empty without local reparametrisation.
        has_fisher: whether every data site is a distribution; a factor has no Fisher matrix.
        model_params: learned parameters of the model that are held fixed here.
    """

    program: Program
    view: GaussianGuide
    ids: Tensor
    noise: Noise
    conjugate: Mapping[str, Conjugate]
    local: frozenset[str]
    row_shapes: Mapping[str, torch.Size]
    has_fisher: bool = True
    model_params: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {
            name: RowNoise(self.noise, self.ids, index, shape)
            for index, (name, shape) in enumerate(self.row_shapes.items())
        }
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_drawn", {})

    @property
    def drawn_sites(self) -> tuple[str, ...]:
        """Sites that are drawn, not treated as distributions."""
        return tuple(name for name in self.view.transforms if name not in self.local)

    @property
    def quadrature(self) -> Quadrature | None:
        """Gauss-Hermite nodes, where all noise is a single number a row."""
        single = len(self.row_shapes) == 1 and next(iter(self.row_shapes.values())).numel() == 1
        return Quadrature() if single and not self.drawn_sites and self.noise.antithetic else None

    def with_noise(self, noise: Noise) -> "GaussianEnergy":
        """The same under other noise."""
        return replace(self, noise=noise)

    def prior(self, gaussian: Gaussian) -> Tensor:
        """KL(q ‖ prior), scalar, nats."""
        variance = gaussian.variance
        cross = [prior.cross_entropy(gaussian.loc[name], variance[name]) for name, prior in self.conjugate.items()]
        if len(self.conjugate) < len(gaussian.loc) or not cross:
            cross.append(self.expected_prior(gaussian, self._minus_log_prior))
        return torch.stack([term.double() for term in cross]).sum() - gaussian.entropy().double()

    def share(self, gaussian: Gaussian, batch: Batch) -> Tensor:
        """E_q[−log likelihood] summed over the batch's rows, scalar, nats."""
        rows, weights = self.over_noise(gaussian, batch, lambda run: run.log_likelihood())
        return -(weights.double() @ rows.double().sum(-1))

    def expected_prior(self, gaussian: Gaussian, function: Callable[[Params], Tensor]) -> Tensor:
        """Mean over the draws of `function(unconstrained values)`."""
        values = gaussian.at(self._normal(gaussian))
        with quiet():
            found = over_draws(function, values, self.noise.num_draws)
        return torch.einsum("s,s...->...", self.noise.weights(found), found)

    def expected_parts(
        self, gaussian: Gaussian, function: Callable[[Params], tuple[Any, Tensor]]
    ) -> tuple[Any, Tensor]:
        """(first parts of every draw along a leading dim, mean over the draws of the second part)."""
        with quiet():
            parts, scalar = over_draws(function, gaussian.at(self._normal(gaussian)), self.noise.num_draws)
        return parts, scalar.mean()

    def over_noise(
        self, gaussian: Gaussian, batch: Batch, function: Callable[[Run], Any], one_by_one: bool = False
    ) -> tuple[Any, Tensor]:
        """(`function(run)` for every draw along a leading dim, the draws' weights).

        `one_by_one` for what `torch.func.vmap` cannot do, such as sampling.
        """
        batched, weights = self._noise_of(gaussian, batch)
        local = {name: (gaussian.loc[name], gaussian.deviation(name)) for name in self.local}

        def of(drawn: Mapping[str, Tensor]) -> Any:
            values = gaussian.loc | {name: drawn[name] for name in self.drawn_sites}
            latents, _ = self.view.constrain(values)
            answers = Answers(latents, gaussians=local, noise={name: drawn[name] for name in self.row_shapes})
            return function(self.program.run(batch, answers, self.model_params))

        with quiet():
            if one_by_one:
                each = [over_draws(of, {n: v[s : s + 1] for n, v in batched.items()}, 1) for s in range(len(weights))]
                return torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *each), weights
            return over_draws(of, batched, len(weights)), weights

    def run_prior(self, values: Params) -> Run:
        """The model on made-up rows at one draw of unconstrained values; its log_det is the guide's map's."""
        latents, log_det = self.view.constrain(values)
        run = self.program.run(self.program.template, Answers(latents, noise=_Zero()), self.model_params)
        return replace(run, log_det=log_det)

    def _minus_log_prior(self, values: Params) -> Tensor:
        return -self.run_prior(values).log_prior(skip=frozenset(self.conjugate))

    def _noise_of(self, gaussian: Gaussian, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        like = next(iter(gaussian.loc.values()))
        if (quadrature := self.quadrature) is not None:
            points, weights = quadrature.points_and_weights(like)
            shape = next(iter(self.row_shapes.values()))
            rows = points.reshape(-1, 1, *(1 for _ in shape)).expand(-1, len(batch), *shape)
            return {next(iter(self.row_shapes)): rows}, weights
        drawn = {name: rows(batch.ids, like) for name, rows in self._rows.items()}  # type: ignore[attr-defined]
        if self.drawn_sites:
            values = gaussian.at(self._normal(gaussian))
            drawn |= {name: values[name] for name in self.drawn_sites}
        return drawn, self.noise.weights(like)

    def _normal(self, gaussian: Gaussian) -> Tensor:
        """The weight noise, drawn once: one seed for all batches."""
        like = next(iter(gaussian.loc.values()))
        key = (str(like.device), like.dtype)
        if key not in self._drawn:  # type: ignore[attr-defined]
            size = sum(value.numel() for value in gaussian.loc.values())
            self._drawn[key] = self.noise.normal(size, like)  # type: ignore[attr-defined]
        return self._drawn[key]  # type: ignore[attr-defined]


class _Zero(dict[str, Tensor]):
    """No noise, whatever the site."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(())
