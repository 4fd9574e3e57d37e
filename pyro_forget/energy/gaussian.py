"""−ELBO of a Gaussian guide in the Gaussian's own coordinates: the energy that forgetting by influence works on."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.effects.noise import Noise, Quadrature, RowNoise
from pyro_forget.effects.program import Program, Run, over_draws, quiet
from pyro_forget.effects.run import Answers
from pyro_forget.energy.conjugate import Conjugate, cross_entropy
from pyro_forget.gaussian import Gaussian, GaussianGuide
from pyro_forget.params import Params

# What the likelihood is a function of: draws of most sites, the Gaussians of those that the model treats locally.
VALUE, LOC, SCALE = "value/", "loc/", "scale/"


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
    def is_closed(self) -> bool:
        """Whether the whole prior term is closed-form."""
        return len(self.conjugate) == len(self.view.transforms)

    @property
    def _local(self) -> tuple[str, ...]:
        return tuple(name for name in self.view.transforms if name in self.local)

    @property
    def quadrature(self) -> Quadrature | None:
        """Gauss-Hermite nodes, where all noise is a single number a row."""
        single = len(self.row_shapes) == 1 and next(iter(self.row_shapes.values())).numel() == 1
        return Quadrature() if single and not self.drawn_sites and self.noise.has_frames(1) else None

    def with_noise(self, noise: Noise) -> "GaussianEnergy":
        """The same under other noise."""
        return replace(self, noise=noise)

    def with_model_params(self, params: Params) -> "GaussianEnergy":
        """The same, noise and what was drawn of it included, with these learned parameters of the model."""
        if not params:
            return self
        new = copy.copy(self)
        object.__setattr__(new, "model_params", params)
        return new

    def prior(self, gaussian: Gaussian) -> Tensor:
        """KL(q ‖ prior), scalar, nats."""
        cross = cross_entropy(self.conjugate, gaussian) if self.conjugate else 0.0
        if not self.is_closed:
            cross = cross + self.expected_prior(gaussian, self._minus_log_prior).double()
        return cross - gaussian.entropy().double()

    def share(self, gaussian: Gaussian, batch: Batch) -> Tensor:
        """E_q[−log likelihood] summed over the batch's rows, scalar, nats."""
        return self.share_at(self.drawn(gaussian), batch)

    def share_at(self, drawn: Params, batch: Batch) -> Tensor:
        """`share` as a function of what `drawn` gives: the dear part of the energy, without the guide."""
        rows, weights = self.over_drawn(drawn, batch, lambda run: run.log_likelihood())
        return -(weights.double() @ rows.double().sum(-1))

    def drawn(self, gaussian: Gaussian) -> Params:
        """What the likelihood sees: "value/site" of shape (draw, *site), or "loc/site" and "scale/site" where local."""
        found = {LOC + name: gaussian.loc[name] for name in self._local}
        found |= {SCALE + name: gaussian.deviation(name) for name in self._local}
        if self.drawn_sites:
            values = gaussian.at(self.weight_noise(gaussian))
            found |= {VALUE + name: values[name] for name in self.drawn_sites}
        return found

    def expected_prior(self, gaussian: Gaussian, function: Callable[[Params], Tensor]) -> Tensor:
        """Mean over the draws of `function(unconstrained values)`."""
        values = gaussian.at(self.weight_noise(gaussian))
        with quiet():
            found = over_draws(function, values, self.noise.num_draws)
        return torch.einsum("s,s...->...", self.noise.weights(found), found)

    def expected_parts(
        self, gaussian: Gaussian, function: Callable[[Params], tuple[Any, Tensor]]
    ) -> tuple[Any, Tensor]:
        """(first parts of every draw along a leading dim, mean over the draws of the second part)."""
        with quiet():
            parts, scalar = over_draws(function, gaussian.at(self.weight_noise(gaussian)), self.noise.num_draws)
        return parts, scalar.mean()

    def over_noise(
        self, gaussian: Gaussian, batch: Batch, function: Callable[[Run], Any], one_by_one: bool = False
    ) -> tuple[Any, Tensor]:
        """(`function(run)` for every draw along a leading dim, the draws' weights).

        `one_by_one` for what `torch.func.vmap` cannot do, such as sampling.
        """
        return self.over_drawn(self.drawn(gaussian), batch, function, one_by_one)

    def over_drawn(
        self, drawn: Params, batch: Batch, function: Callable[[Run], Any], one_by_one: bool = False
    ) -> tuple[Any, Tensor]:
        """`over_noise` as a function of what `drawn` gives."""
        noise, weights = self._row_noise(batch, next(iter(drawn.values())))
        values = {VALUE + name: drawn[VALUE + name] for name in self.drawn_sites}
        local = {name: (drawn[LOC + name], drawn[SCALE + name]) for name in self._local}

        def of(one: Mapping[str, Tensor]) -> Any:
            latents = {name: loc for name, (loc, _) in local.items()}
            latents |= {name: one[VALUE + name] for name in self.drawn_sites}
            answers = Answers(self.view.support(latents), gaussians=local, noise=one)
            return function(self.program.run(batch, answers, self.model_params))

        with quiet():
            if one_by_one:
                draws = [{name: v[s : s + 1] for name, v in (values | noise).items()} for s in range(len(weights))]
                each = [over_draws(of, draw, 1) for draw in draws]
                return torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *each), weights
            return over_draws(of, values | noise, len(weights)), weights

    def run_prior(self, values: Params) -> Run:
        """The model on made-up rows at one draw of unconstrained values; its log_det is the guide's map's."""
        latents, log_det = self.view.constrain(values)
        run = self.program.run(self.program.template, Answers(latents, noise=_Zero()), self.model_params)
        return replace(run, log_det=log_det)

    def _minus_log_prior(self, values: Params) -> Tensor:
        return -self.run_prior(values).log_prior(skip=frozenset(self.conjugate))

    def weight_noise(self, gaussian: Gaussian) -> Tensor:
        """Shape (draw, d), drawn once: one seed for all batches."""
        like = next(iter(gaussian.loc.values()))
        key = (str(like.device), like.dtype)
        if key not in self._drawn:  # type: ignore[attr-defined]
            size = sum(value.numel() for value in gaussian.loc.values())
            self._drawn[key] = self.noise.normal(size, like)  # type: ignore[attr-defined]
        return self._drawn[key]  # type: ignore[attr-defined]

    def _row_noise(self, batch: Batch, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(noise of the auxiliary sites, the draws' weights)."""
        if (quadrature := self.quadrature) is not None:
            points, weights = quadrature.points_and_weights(like)
            shape = next(iter(self.row_shapes.values()))
            rows = points.reshape(-1, 1, *(1 for _ in shape)).expand(-1, len(batch), *shape)
            return {next(iter(self.row_shapes)): rows}, weights
        drawn = {name: rows(batch.ids, like) for name, rows in self._rows.items()}  # type: ignore[attr-defined]
        return drawn, self.noise.weights(like)


class _Zero(dict[str, Tensor]):
    """No noise, whatever the site."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(())
