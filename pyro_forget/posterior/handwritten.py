"""A posterior whose energy was written by hand: the door for those who have F and h but no Pyro model."""

import copy

from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy import Energy
from pyro_forget.params import Params, clone
from pyro_forget.store import digest


class EnergyPosterior:
    """Parameters at the minimum of an energy.

    Args:
        params: unconstrained parameters by name; copied.
        energy: such as `FunctionEnergy(total, share)`.
        data: the rows they were fitted to; only the ids are kept.
    """

    def __init__(self, params: Params, energy: Energy, data: Data) -> None:
        self.params = clone(params)
        self.energy = energy
        self.ids = data.ids
        self.parent: str | None = None

    @property
    def num_data(self) -> int:
        """How many rows."""
        return len(self.ids)

    @property
    def digest(self) -> str:
        """SHA-256 over parameters and ids, in hex."""
        return digest({**self.params, "ids": self.ids}, {"kind": "energy"})

    def edited(self, params: Params, ids: Tensor) -> "EnergyPosterior":
        """A new posterior of other parameters and rows."""
        new = copy.copy(self)
        new.params, new.ids, new.parent = clone(params), ids.clone(), self.digest
        return new

    def draws(self, num_draws: int, seed: int = 0) -> Params:
        """Not known: an energy says what its parameters are, not what they parametrise.

        Raises:
            ValueError: always.
        """
        raise ValueError("A hand-written energy has no draws; read `params` of this posterior instead.")
