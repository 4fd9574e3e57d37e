"""Taking over an existing program: what it must be for its energy to be a sum over rows, checked once."""

from pyro_forget.effects.adoption.guide import adopt_guide, first_params, start_guide
from pyro_forget.effects.adoption.rows import check_rows
from pyro_forget.effects.adoption.structure import adopt_model, latent_shapes, prior_latents, start_model

__all__ = [
    "adopt_guide",
    "adopt_model",
    "check_rows",
    "first_params",
    "latent_shapes",
    "prior_latents",
    "start_guide",
    "start_model",
]
