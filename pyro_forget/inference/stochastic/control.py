"""Control variates: the gradient at a fixed point, known on all data, takes out most of a batch's noise.

∇U(θ) is estimated by ∇prior(θ) + G(a) + N/B·Σ_batch [∇h(θ, z) − ∇h(a, z)], G(a) the full gradient of the likelihood
at the anchor a. It is unbiased whatever the anchor, and the closer the anchor the less noise. A step costs two
gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SVRG:
    """The anchor is where the chain was at most `every` steps ago.

    References:
        Dubey, Reddi, Williamson, Poczos, Smola and Xing (2016), Variance reduction in stochastic gradient Langevin
        dynamics, algorithm 1.
    """

    every: int = 1000

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {self.every}.")


@dataclass(frozen=True, eq=False)
class FixedMode:
    """The anchor stays at a mode that was found before.

    Attributes:
        latents: constrained values by site, (*site).

    References:
        Baker, Fearnhead, Fox and Nemeth (2019), Control variates for stochastic gradient MCMC, section 3.
    """

    latents: Mapping[str, Tensor]


Control = SVRG | FixedMode
