"""A guide seen as one Gaussian over the unconstrained latents, and written back.

Forgetting works on the Gaussian's own coordinates, location and scale; the guide's parameters are only a map to them
(softplus or exp, one vector or many sites). The map is found from the guide's trace by changing the parameters and
looking at what the trace's Normals do.
"""

from pyro_forget.gaussian.coordinates import Gaussian
from pyro_forget.gaussian.guide import GaussianGuide, gaussian_guide

__all__ = ["Gaussian", "GaussianGuide", "gaussian_guide"]
