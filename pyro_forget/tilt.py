"""The tilted retained energy: what forgetting minimises.

F(γ, S∖S′) − ⟨t, γ − γ₀⟩ with t = ∇F(γ₀, S), all under one pinned noise. γ₀ is its exact minimiser when nothing is
erased, whatever noise or optimiser the fit had; its first Newton step from γ₀ is the influence function (Fu, He, Tao,
2021, section 4). Since ∇F(γ₀, S) = ∇F(γ₀, S∖S′) + ∇h(γ₀), no pass over more than the retained data is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.energy import Energy, NonFinite, estimate_and_gradient, gradient_over, share_and_gradient
from pyro_forget.params import Params, add, dot, subtract


@dataclass(frozen=True)
class TiltedEnergy:
    """F(γ, S∖S′) − ⟨t, γ − γ₀⟩ under one pinned noise.

    Attributes:
        energy: F under that noise.
        retained: S∖S′.
        origin: γ₀.
        share: ∇h(γ₀) of the erased data, the force that the request exerts.
        tilt: t = ∇F(γ₀, S).
        at_origin: F(γ₀, S∖S′), nats.
    """

    energy: Energy
    retained: Data
    origin: Params
    share: Params
    tilt: Params
    at_origin: float

    @staticmethod
    def of(energy: Energy, origin: Params, erased: Data, retained: Data) -> "TiltedEnergy":
        """Measure the tilt at γ₀."""
        at_origin, force = total_and_gradient(energy, origin, retained)
        _, share = gradient_over(energy.share, origin, erased)
        return TiltedEnergy(energy, retained, origin, share, add(force, share), at_origin)

    def value(self, params: Params) -> float:
        """The tilted energy, nats, float64; infinite where the energy is not finite."""
        with torch.no_grad():
            total = float(self.energy.total(params, self.retained))
        return self._tilted(total, params)

    def untilted(self, value: float, params: Params) -> float:
        """F(γ, S∖S′) itself, nats, where the tilted energy has this value."""
        return value + float(dot(self.tilt, subtract(params, self.origin)))

    def value_and_gradient(self, params: Params) -> tuple[float, Params]:
        """The tilted energy and its gradient; infinity and none where the energy is not finite."""
        try:
            total, gradient = total_and_gradient(self.energy, params, self.retained)
        except NonFinite:
            return float("inf"), {}
        return self._tilted(total, params), subtract(gradient, self.tilt)

    def _tilted(self, total: float, params: Params) -> float:
        tilted = total - float(dot(self.tilt, subtract(params, self.origin)))
        return tilted if tilted == tilted else float("inf")


def total_and_gradient(energy: Energy, params: Params, data: Data) -> tuple[float, Params]:
    """(F(γ, data), ∇F), one batch's graph at a time.

    The prior comes with the first batch: a hand-written energy knows it only there.
    """
    state: list[bool] = []

    def of(batch: Batch) -> tuple[Tensor, Params]:
        first = not state
        state.append(True)
        if first:
            value, gradient = estimate_and_gradient(energy, params, batch, len(batch))
        else:
            value, gradient = share_and_gradient(energy, params, batch)
        return torch.tensor(value, dtype=torch.float64), gradient

    value, gradient = data.reduce(of)
    return float(value), gradient
