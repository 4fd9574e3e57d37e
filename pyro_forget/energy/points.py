"""A posterior as points that a network is run at: many of them under the same noise, in one pass.

For a Gaussian guide a point is its location, the scales held fixed; for another guide its parameters; of draws each
is a point of its own. What stochastic methods need of a point is the model's run for a batch at given noise, and the
prior's pull.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.effects.noise import seeded
from pyro_forget.effects.program import Run, quiet
from pyro_forget.effects.run import Answers
from pyro_forget.energy.conjugate import Conjugate
from pyro_forget.energy.gaussian import GaussianEnergy
from pyro_forget.energy.sampled import SampledEnergy
from pyro_forget.energy.variational import GuideEnergy, guide_part, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, norm

Noise = dict[str, Tensor]
_WEIGHTS = "weights of the guide"  # no name of a site has blanks


class Points(Protocol):
    """How to run the model at a point; a point is params without a leading dim.

    Attributes:
        shares_noise: whether all rows of a batch see one draw of noise, so that an expectation wants several batches.
    """

    @property
    def shares_noise(self) -> bool:
        """As above."""
        ...

    def noise(self, batch: Batch, seed: int) -> Noise:
        """One draw of standard normal noise for a batch, empty where the energy has none."""
        ...

    def run(self, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Run:
        """The model on a batch, its data sites alone of interest."""
        ...

    def prior(self, point: Params, seed: int) -> Tensor:
        """−log prior or the divergence to it, up to what the point does not change; scalar, nats."""
        ...

    def prior_slopes(self, stacked: Params) -> Params | None:
        """The slope of `prior` at each of the stacked points where it is closed-form, else None."""
        ...

    def typical_size(self, point: Params) -> float:
        """Root mean square of the latents under the posterior: what steps in them are to be measured by."""
        ...


@dataclass(frozen=True)
class LocationPoints:
    """Locations of a Gaussian guide.

    Attributes:
        energy: the guide's.
        scale: as in `Gaussian`, held fixed.
    """

    energy: GaussianEnergy
    scale: Params | Tensor

    @property
    def shares_noise(self) -> bool:
        """Weights that are drawn whole are the same for all rows."""
        return bool(self.energy.drawn_sites)

    def noise(self, batch: Batch, seed: int) -> Noise:
        """Of the auxiliary sites for each row, and of the weights that are drawn whole."""
        like = self.scale if isinstance(self.scale, Tensor) else next(iter(self.scale.values()))
        generator = seeded(like.device, seed)
        shapes = {name: (len(batch), *shape) for name, shape in self.energy.row_shapes.items()}
        if self.energy.drawn_sites:
            shapes[_WEIGHTS] = (self._size,)
        return {
            name: torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
            for name, shape in shapes.items()
        }

    def run(self, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Run:
        """At one location; sites under local reparametrisation keep their noise for each row."""
        latents = {name: point[name] for name in self.energy.view.transforms}
        if self.energy.drawn_sites:
            drawn = Gaussian(point, self.scale).at(noise[_WEIGHTS][None])
            latents |= {name: drawn[name][0] for name in self.energy.drawn_sites}
        # Independent scales by site where anything is local: `at_site` is empty for a full covariance.
        local = {name: (point[name], cast(Params, self.scale)[name]) for name in self.energy.local}
        own = {name: value for name, value in noise.items() if name != _WEIGHTS}
        answers = Answers(self.energy.view.support(latents), gaussians=local, noise=own)
        return self.energy.program.run(batch, answers)

    def prior(self, point: Params, seed: int) -> Tensor:
        """E_q[−log prior], closed-form where the priors are fixed Normals; under one draw pair elsewhere."""
        gaussian = Gaussian(point, self.scale)
        # Of sites that are left out of `point` nothing is asked, which closed forms can do without.
        found = [prior.half_square(point[name]) for name, prior in self.energy.conjugate.items() if name in point]
        if not self.energy.is_closed:
            like = next(iter(point.values()))
            epsilon = torch.randn(self._size, generator=seeded(like.device, seed), dtype=like.dtype, device=like.device)
            values = gaussian.at(torch.stack([epsilon, -epsilon]))
            skip = frozenset(self.energy.conjugate)
            for place in range(2):
                run = self.energy.run_prior({name: value[place] for name, value in values.items()})
                found.append(-0.5 * run.log_prior(skip=skip).double())
        return torch.stack(found).sum()

    def prior_slopes(self, stacked: Params) -> Params | None:
        """Closed-form where all priors are fixed Normals."""
        return pulls(self.energy.conjugate, stacked) if self.energy.is_closed else None

    def typical_size(self, point: Params) -> float:
        """Of locations and standard deviations together."""
        variance = Gaussian(point, self.scale).variance
        return math.sqrt(mean_square(point) + sum(float(value.sum()) for value in variance.values()) / self._size)

    @property
    def _size(self) -> int:
        if isinstance(self.scale, Tensor):
            return len(self.scale)
        return sum(value.numel() for value in self.scale.values())


@dataclass(frozen=True)
class GuidePoints:
    """Parameters of any guide whose noise is standard normal, point masses among them."""

    energy: GuideEnergy

    @property
    def shares_noise(self) -> bool:
        """A point mass has none."""
        return bool(self.energy.guide.num_normals)

    def noise(self, batch: Batch, seed: int) -> Noise:
        """Of one draw of the guide."""
        like = next(iter(self.energy.guide.guide.params.values()))
        size = self.energy.guide.num_normals or 0
        drawn = torch.randn(size, generator=seeded(like.device, seed), dtype=like.dtype, device=like.device)
        return {_WEIGHTS: drawn}

    def run(self, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Run:
        """At the latents that the guide draws."""
        latents = self.energy.guide.run(guide_part(point), noise[_WEIGHTS]).latents
        return self.energy.program.run(batch, Answers(latents), model_part(point))

    def prior(self, point: Params, seed: int) -> Tensor:
        """E_q[log q − log prior] under one draw."""
        noise = self.noise(self.energy.program.template, seed)
        with quiet():
            drawn = self.energy.guide.run(guide_part(point), noise[_WEIGHTS])
            template = self.energy.program.template
            prior = self.energy.program.run(template, Answers(drawn.latents), model_part(point)).log_prior()
        return (drawn.log_prob() - prior).double()

    def prior_slopes(self, stacked: Params) -> Params | None:
        """Not closed-form."""
        return None

    def typical_size(self, point: Params) -> float:
        """Of one draw."""
        noise = self.noise(self.energy.program.template, 0)[_WEIGHTS]
        with quiet(), torch.no_grad():
            return math.sqrt(mean_square(self.energy.guide.run(guide_part(point), noise).latents))


@dataclass(frozen=True)
class DrawPoints:
    """Unconstrained draws, one a point."""

    energy: SampledEnergy

    @property
    def shares_noise(self) -> bool:
        """There is none."""
        return False

    def noise(self, batch: Batch, seed: int) -> Noise:
        """None: draws are all the noise there is."""
        return {}

    def run(self, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Run:
        """At one draw."""
        return self.energy.program.run(batch, Answers(point, unconstrained=True))

    def prior(self, point: Params, seed: int) -> Tensor:
        """−log prior, log-Jacobian included."""
        template = self.energy.program.template
        with quiet():
            return -self.energy.program.run(template, Answers(point, unconstrained=True)).log_prior().double()

    def prior_slopes(self, stacked: Params) -> Params | None:
        """Not closed-form."""
        return None

    def typical_size(self, point: Params) -> float:
        """Of the draw."""
        return math.sqrt(mean_square(point))


def mean_square(params: Params) -> float:
    """Over all numbers."""
    return norm(params) ** 2 / sum(value.numel() for value in params.values())


def over_points(
    points: Points,
    stacked: Params,
    batch: Batch,
    noise: Mapping[str, Tensor],
    function: Callable[[Run], Any],
    fixed: Params | None = None,
) -> Any:
    """`function(run)` at each point along the leading dim of `stacked`, in one pass.

    What the points do not change, such as the variance of a first layer under local reparametrisation, is computed
    once for all. `fixed` are the entries that all points share, without a leading dim.
    """

    def of(point: Params) -> Any:
        return function(points.run({**(fixed or {}), **point}, batch, noise))

    with quiet():
        return torch.func.vmap(of, randomness="error")(stacked)


def pulls(priors: Mapping[str, Conjugate], stacked: Params) -> Params:
    """The slopes of fixed Normal priors at each of the stacked points."""
    return {name: priors[name].add_gradient(priors[name].gap(v), torch.zeros_like(v)) for name, v in stacked.items()}


def prior_gradient(points: Points, stacked: Params, seed: int) -> Params:
    """The prior's slope at each point along the leading dim of `stacked`."""
    if (closed := points.prior_slopes(stacked)) is not None:
        return closed
    leaves = {name: value.detach().requires_grad_(True) for name, value in stacked.items()}
    count = len(next(iter(leaves.values())))
    with torch.enable_grad(), quiet():
        total = torch.stack([points.prior({n: v[c] for n, v in leaves.items()}, seed) for c in range(count)]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
