"""−ELBO as a function of a guide's parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_forget.data import Batch, Data
from pyro_forget.effects.guide import Guide, GuideRun
from pyro_forget.effects.noise import Noise, seeded
from pyro_forget.effects.program import Program, over_draws, quiet
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Answers, Latents
from pyro_forget.energy.conjugate import Conjugate, conjugate_of
from pyro_forget.energy.gaussian import GaussianEnergy
from pyro_forget.energy.protocol import estimate_of_parts, total_of_parts
from pyro_forget.gaussian import Gaussian, GaussianGuide, gaussian_guide
from pyro_forget.params import Params, map_params

MODEL_PREFIX = "model."
MAX_FRAME = 256
FEW_PAIRS = 8
MANY_PAIRS = 64
DRAWS_TIMES_ROWS = 200_000
NETWORK_PAIRS = 16


@dataclass(frozen=True)
class VariationalEnergy:
    """F(γ, S) = KL(q_γ ‖ prior) + Σ E_q[−log p(z | θ)] of an adopted guide, under pinned noise.

    Attributes:
        gaussian: the energy in the Gaussian's own coordinates, where the guide is one; None otherwise.
        whole: the energy by runs of the guide itself, for every guide.
    """

    gaussian: GaussianEnergy | None
    whole: "GuideEnergy"

    @property
    def noise(self) -> Noise:
        """What is pinned."""
        return self.whole.noise

    def prior(self, params: Params) -> Tensor:
        """KL(q ‖ prior), scalar, nats: closed-form where site and guide allow."""
        return self.whole.prior(params) if self.gaussian is None else self._gaussian(params).prior(self.read(params))

    def share(self, params: Params, batch: Batch) -> Tensor:
        """E_q[−log likelihood] summed over the batch's rows, scalar, nats."""
        if self.gaussian is None:
            return self.whole.share(params, batch)
        return self._gaussian(params).share(self.read(params), batch)

    def total(self, params: Params, data: Data) -> Tensor:
        """F(γ, data), scalar, nats."""
        return total_of_parts(self, params, data)

    def with_noise(self, seed: int, pairs: int | None = None) -> "VariationalEnergy":
        """The same under other noise; `pairs` None keeps their number."""
        return self.under(Noise(seed, pairs or self.noise.pairs))

    def with_fresh_noise(self, seed: int, num_draws: int) -> "VariationalEnergy":
        """The same under independent draws for one batch, the noise of stochastic methods."""
        return self.under(Noise.fresh(seed, num_draws))

    def estimate(self, params: Params, batch: Batch, num_data: int) -> Tensor:
        """F(γ, S) estimated with the batch standing for all `num_data` rows, scalar, nats."""
        return estimate_of_parts(self, params, batch, num_data)

    def under(self, noise: Noise) -> "VariationalEnergy":
        """The same under exactly this noise."""
        gaussian = None if self.gaussian is None else self.gaussian.with_noise(noise)
        return VariationalEnergy(gaussian, replace(self.whole, noise=noise))

    def _gaussian(self, params: Params) -> GaussianEnergy:
        energy = self.gaussian
        if energy is None:
            raise ValueError("This guide is not a Gaussian.")
        return energy.with_model_params(model_part(params))

    def read(self, params: Params) -> Gaussian:
        """The Gaussian that the params stand for; differentiable.

        Raises:
            ValueError: the guide is not one.
        """
        if self.whole.view is None:
            raise ValueError("This guide is not a Gaussian.")
        return self.whole.view.read(guide_part(params))


@dataclass(frozen=True)
class GuideEnergy:
    """−ELBO by runs of the guide: for flows, structured and low-rank guides, and point masses."""

    program: Program
    guide: Guide
    noise: Noise
    view: GaussianGuide | None = None
    draws: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def prior(self, params: Params) -> Tensor:
        """E_q[log q − log prior], scalar, nats."""

        def of(latents: Latents, run: GuideRun) -> Tensor:
            prior = self.program.run(self.program.template, Answers(latents), model_part(params)).log_prior()
            return run.log_prob() - prior

        return self._expect(params, of).mean()

    def share(self, params: Params, batch: Batch) -> Tensor:
        """E_q[−log likelihood] summed over the batch's rows, scalar, nats."""

        def of(latents: Latents, run: GuideRun) -> Tensor:
            return -self.program.run(batch, Answers(latents), model_part(params)).log_likelihood().sum()

        return self._expect(params, of).mean()

    def _expect(self, params: Params, function: Callable[[Latents, GuideRun], Any]) -> Any:
        """`function` of every draw, along a leading dim."""
        guided = guide_part(params)

        def of(drawn: Mapping[str, Tensor]) -> Any:
            run = self.guide.run(guided, drawn["noise"])
            return function(run.latents, run)

        like = next(iter(params.values()))
        with quiet():
            if self.guide.num_normals == 0:
                return over_draws(of, {"noise": like.new_zeros(1, 0)}, 1)
            if self.guide.num_normals is None:
                return self._expect_by_seed(guided, function)
            noise = self.noise.normal(self.guide.num_normals, like)
            if self.guide.vectorised:
                return over_draws(of, {"noise": noise}, len(noise))
            return torch.stack([of({"noise": row}) for row in noise])

    def _expect_by_seed(self, guided: Params, function: Any) -> Any:
        """Guides with randomness other than Normals: one seed a draw."""
        found = []
        for place in range(self.noise.num_draws):
            with forked_rng(int(seeded(torch.device("cpu"), self.noise.seed, place).initial_seed())):
                run = self.guide.run(guided, None)
            found.append(function(run.latents, run))
        return torch.stack(found)


def guide_part(params: Params) -> Params:
    """The guide's own parameters."""
    return {name: value for name, value in params.items() if not name.startswith(MODEL_PREFIX)}


def model_part(params: Params) -> Params:
    """The model's learned parameters, under their own names."""
    return {name[len(MODEL_PREFIX) :]: value for name, value in params.items() if name.startswith(MODEL_PREFIX)}


def variational_energy(program: Program, guide: Guide, ids: Tensor) -> VariationalEnergy:
    """Find out what a guide and its model are, once: Gaussian or not, closed-form or not, local or not."""
    with quiet(), torch.no_grad():
        latents = first_draw(guide).latents
        sites = program.run(program.template, Answers(latents, noise=_Zeros()), {}).sites
        transforms = {site.name: biject_to(site.fn.support) for site in sites if not site.observed}
        view = gaussian_guide(guide, {name: transforms[name] for name in transforms})
        if view is None:
            noise = Noise(pairs=default_pairs(guide.num_normals or 1, {}, len(ids)))
            return VariationalEnergy(None, GuideEnergy(program, guide, noise))
        local, row_shapes = _local_sites(program, guide, view, latents)
        size = guide.num_normals or 0
        noise = Noise(pairs=default_pairs(0 if local == set(transforms) else size, row_shapes, len(ids)))
        known = _conjugate_sites(program, view, latents)
        factors = any(type(site.fn).__name__ == "Unit" for site in sites if site.is_data)
        energy = GaussianEnergy(program, view, ids, noise, known, local, row_shapes, not factors)
        return VariationalEnergy(energy, GuideEnergy(program, guide, noise, view))


def default_pairs(size: int, row_shapes: Mapping[str, torch.Size], num_data: int) -> int:
    """Enough pairs for exact second moments where that is affordable.

    Frames need as many pairs as coordinates: all `size` weights that are drawn, the outputs of one row under local
    reparametrisation. What is not quadratic in the weights (a latent scale, say) wants more draws than that, so few
    weights get up to 64 pairs where the rows are few. Hidden layers of a network are out of reach; there the mean
    over pairs must do.
    """
    if size:
        affordable = min(MANY_PAIRS, DRAWS_TIMES_ROWS // max(num_data, 1))
        return max(size, affordable, FEW_PAIRS) if size <= MAX_FRAME else NETWORK_PAIRS
    outputs = [shape.numel() for shape in row_shapes.values()]
    return max([FEW_PAIRS, *(number for number in outputs if number <= NETWORK_PAIRS)])


def first_draw(guide: Guide) -> GuideRun:
    """One draw of a guide, the same every time."""
    with forked_rng(0), torch.no_grad(), quiet():
        return guide.run(guide.guide.params, None)


def _local_sites(
    program: Program, guide: Guide, view: GaussianGuide, latents: Latents
) -> tuple[frozenset[str], dict[str, torch.Size]]:
    """The sites that local reparametrisation takes over, and the noise of one row that it asks for."""
    gaussian = view.read(guide.guide.params)
    offered = {name: (gaussian.loc[name], gaussian.deviation(name)) for name in view.at_site}
    recorder = program.record(program.template, Answers(latents, gaussians=offered, noise=_Zeros()))
    shapes = {name: shape[1:] for name, shape in recorder.noise_shapes.items()}
    wrong = [name for name, shape in recorder.noise_shapes.items() if not shape or shape[0] != len(program.template)]
    if wrong:
        raise ValueError(
            f"Local reparametrisation found {len(wrong)} layers whose output has no row for each datum in front. Its "
            "noise belongs to rows: put the data dim first."
        )
    return view.at_site & recorder.local_sites, shapes


def _conjugate_sites(program: Program, view: GaussianGuide, latents: Latents) -> dict[str, Conjugate]:
    """Sites whose prior is a Normal that neither other latents nor learned parameters change."""
    generator = seeded(torch.device("cpu"), 1)

    def moved(params: Params) -> Params:
        return map_params(lambda v: v + 0.1 * torch.randn(v.shape, generator=generator).to(v), params)

    values = {name: view.transforms[name].inv(value) for name, value in latents.items()}
    other, _ = view.constrain(moved(values))
    runs = [
        program.run(program.template, Answers(latents, noise=_Zeros())),
        program.run(program.template, Answers(other, noise=_Zeros()), moved(program.model.params)),
    ]
    pairs = zip(*(({site.name: site for site in run.sites if not site.observed}).items() for run in runs), strict=True)
    found = {name: conjugate_of(first, second) for (name, first), (_, second) in pairs if view.is_real(name)}
    return {name: prior for name, prior in found.items() if prior is not None}


class _Zeros(dict[str, Tensor]):
    """Zero noise for whatever auxiliary site asks."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(())
