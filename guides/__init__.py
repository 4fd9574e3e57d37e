"""Guide families, and the sampling effects that make their energies less noisy."""

from pyro_forget.guides.gaussian_weight import GaussianWeight
from pyro_forget.guides.local_reparametrization import local_reparametrization
from pyro_forget.guides.mean_field import MeanField

__all__ = ["GaussianWeight", "MeanField", "local_reparametrization"]
