"""The waist of the hourglass: what every forgetter edits and every export reads."""

from typing import Protocol, Self

from torch import Tensor

from pyro_forget.effects.run import Latents
from pyro_forget.energy import Energy
from pyro_forget.params import Params


class Posterior(Protocol):
    """A posterior holds parameters and the ids of its rows, never data; it is never changed.

    Attributes:
        params: unconstrained parameters by name.
        ids: int64, shape (num_data,): the rows it was fitted to.
        parent: digest of the posterior that this one was edited from.
    """

    params: Params
    ids: Tensor
    parent: str | None

    @property
    def energy(self) -> Energy:
        """Least at `params` for the rows of `ids`."""
        ...

    @property
    def num_data(self) -> int:
        """How many rows."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over parameters and ids, in hex; the same on every platform."""
        ...

    def edited(self, params: Params, ids: Tensor) -> Self:
        """A new posterior of other parameters and rows."""
        ...

    def draws(self, num_draws: int, seed: int = 0) -> Latents:
        """Equally weighted draws in the sites' supports, each of shape (num_draws, *site)."""
        ...
