"""The settings of one cell of the study."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.gaussian_mixture.fit import Fit
from experiments.gaussian_mixture.sampled import Sampled
from experiments.gaussian_mixture.task import Task
from experiments.gaussian_mixture.variational import Variational
from experiments.words import check_choices, option
from pyro_forget.inference.recursion import Recursion
from pyro_forget.models import GaussianMixture

ALLOWED = {
    "data": ("published", "simulated"),
    "fit": ("variational", "sgld", "sghmc"),
    "method": ("default", "published"),
}


@dataclass(frozen=True)
class Settings:
    """What a cell depends on, apart from its seed."""

    data: str = option("published", "The paper's points, or simulated ones.")
    fit: str = option("variational", "variational, sgld or sghmc.")
    method: str = option("default", "default or published.")
    num_erased: int = option(800, "Points that go.")
    chunk: int = option(100, "Points a request.")
    num_points: int = option(2000, "Of simulated data.")
    num_components: int = option(4, "Components of the mixture.")
    spread: float = option(2.5, "Standard deviation of simulated centres.")
    prior_std: float = option(1.0, "Standard deviation of the centres' prior.")
    scaling: float = option(1.0, "Of the published recursion.")
    recursion_steps: int = option(32, "T of the published recursion.")
    recursion_chunk: int = option(4, "Points that the published recursion erases at a time.")
    data_root: str = option("", "Folder of gmm/; PYRO_FORGET_DATA where none is given.")

    def __post_init__(self) -> None:
        """Refuse what would only fail after the fit."""
        check_choices(self, ALLOWED)

    def task(self, seed: int) -> Task:
        """The points, and which go."""
        if self.data == "published":
            return Task.published(Path(self.data_root) if self.data_root else None, self.num_erased, seed)
        return Task.simulated(self.num_points, self.num_components, self.spread, self.num_erased, seed)

    def fitting(self) -> Fit:
        """The way to fit."""
        model = GaussianMixture(self.num_components, prior_std=self.prior_std)
        start = partial(Task.start, num_components=self.num_components)
        recursion = Recursion(self.scaling, self.recursion_steps, 64, 5, self.recursion_chunk)
        if self.fit == "variational":
            return Variational(model, start, recursion)
        return Sampled(model, start, self.fit, recursion)
