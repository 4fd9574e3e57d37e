"""A common shift of draws as a point that a network is run at: the draws are its noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.effects.noise import seeded
from pyro_forget.effects.program import Run, quiet
from pyro_forget.effects.run import Answers
from pyro_forget.energy.conjugate import Conjugate, conjugate_of
from pyro_forget.energy.points import mean_square, pulls
from pyro_forget.energy.sampled import SampledEnergy
from pyro_forget.params import Params, add

_DRAW = "draw"
_PRIOR_DRAWS = 16  # that a prior without a closed form is averaged over


@dataclass(frozen=True)
class ShiftPoints:
    """Shifts γ of a cloud, with the energy E over draws of −log joint at θ + γ.

    Under one draw of noise all rows of a batch see one draw of the cloud.

    Attributes:
        energy: of draws.
        draws: equally weighted and unconstrained, (draw, *site).
        centre: their mean.
        conjugate: sites with fixed Normal priors.
        closed: whether these are the whole prior.
    """

    energy: SampledEnergy
    draws: Params
    centre: Params
    conjugate: Mapping[str, Conjugate]
    closed: bool

    @staticmethod
    def of(energy: SampledEnergy, draws: Params) -> "ShiftPoints":
        """With what its priors have in closed form."""
        first = {name: value[0] for name, value in draws.items()}
        places = (first, {name: value + 1.0 for name, value in first.items()})
        with quiet(), torch.no_grad():
            runs = [energy.program.run(energy.program.template, Answers(p, unconstrained=True)) for p in places]
        pairs = zip(*([site for site in run.sites if not site.is_data] for run in runs), strict=True)
        known = {one.name: conjugate_of(one, other) for one, other in pairs}
        conjugate = {name: prior for name, prior in known.items() if name in draws and prior is not None}
        centre = {name: value.mean(0) for name, value in draws.items()}
        return ShiftPoints(energy, draws, centre, conjugate, known.keys() == conjugate.keys())

    @property
    def shares_noise(self) -> bool:
        """One draw for all rows of a batch."""
        return True

    def noise(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """The place of a draw."""
        return {_DRAW: torch.randint(self._count, (), generator=seeded(torch.device("cpu"), seed))}

    def run(self, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Run:
        """At one shifted draw."""
        return self.energy.program.run(batch, Answers(self._shifted(point, int(noise[_DRAW])), unconstrained=True))

    def prior(self, point: Params, seed: int) -> Tensor:
        """−log prior, log-Jacobian included: its mean over all draws in closed form, over some elsewhere."""
        found = [p.half_square(self.centre[n] + point[n]) for n, p in self.conjugate.items() if n in point]
        if not self.closed:
            some = torch.linspace(0, self._count - 1, min(self._count, _PRIOR_DRAWS)).round().long().tolist()
            found += [self._open_prior(self._shifted(point, place)) / len(some) for place in some]
        return torch.stack(found).sum()

    def prior_slopes(self, stacked: Params) -> Params | None:
        """Closed-form where all priors are fixed Normals: that at the centre."""
        if not self.closed:
            return None
        return pulls(self.conjugate, {name: self.centre[name] + value for name, value in stacked.items()})

    def typical_size(self, point: Params) -> float:
        """Of the draws."""
        return math.sqrt(mean_square(self.draws))

    def _open_prior(self, latents: Params) -> Tensor:
        with quiet():
            run = self.energy.program.run(self.energy.program.template, Answers(latents, unconstrained=True))
            return -run.log_prior(skip=frozenset(self.conjugate)).double()

    def _shifted(self, point: Params, place: int) -> Params:
        return add({name: self.draws[name][place] for name in point}, point)

    @property
    def _count(self) -> int:
        return len(next(iter(self.draws.values())))
