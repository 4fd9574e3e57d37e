"""The settings of one cell of the study, and its presets."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.images import Images, load_images
from pyro_forget.data import Data
from pyro_forget.models import MLP, LeNet

ALLOWED = {
    "data": ("fashion_mnist", "mnist"),
    "net": ("mlp", "lenet"),
    "fit": ("svi", "sgld", "sghmc"),
    "method": ("before", "default", "published", "finetune", "retrain"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What a cell depends on, apart from its seed."""

    data: str = _option("fashion_mnist", "fashion_mnist or mnist.")
    net: str = _option("mlp", "mlp (784-128-10) or lenet.")
    fit: str = _option("svi", "svi, sgld or sghmc.")
    method: str = _option("default", "before, default, published, finetune or retrain.")
    num_erased: int = _option(200, "Images of class 0 that go, the first of a random order.")
    num_train: int = _option(10_000, "Training images.")
    num_test: int = _option(2_000, "Test images.")
    num_steps: int = _option(3_120, "Of the fit.")
    learning_rate: float = _option(2e-3, "Of Adam, decaying by a cosine.")
    prior_std: float = _option(0.1, "Of each weight.")
    step_size: float = _option(0.5, "Of SGLD and SGHMC, times 1 / N.")
    decay: float = _option(0.5, "Exponent of their step sizes.")
    friction: float = _option(0.4, "Of SGHMC.")
    num_draws: int = _option(20, "Draws of a chain that are kept.")
    thin: int = _option(50, "Steps a draw.")
    scaling: float = _option(0.1, "Of the published recursion.")
    recursion_steps: int = _option(64, "T of the published recursion.")
    finetune_steps: int = _option(390, "Of Adam in fine-tuning.")
    data_root: str = _option("", "Folder of the data; PYRO_FORGET_DATA where none is given.")
    download: bool = _option(False, "Fetch the data where they are missing.")

    def __post_init__(self) -> None:
        """Refuse what would only fail after the fit."""
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose from {', '.join(allowed)}.")

    @property
    def model(self) -> MLP | LeNet:
        """The network."""
        return MLP((784, 128, 10), self.prior_std) if self.net == "mlp" else LeNet(prior_std=self.prior_std)

    def task(self, seed: int) -> "Task":
        """The images, and which go."""
        images = load_images(self.data, self.data_root or None, self.download).subset(
            self.num_train, self.num_test, seed
        )
        own = torch.nonzero(images.y == 0)[:, 0]
        if self.num_erased > len(own):
            raise ValueError(f"Class 0 has {len(own)} images: --num-erased {self.num_erased} is more.")
        return Task(
            replace(images, x=self._inputs(images.x), x_test=self._inputs(images.x_test)), own[: self.num_erased]
        )

    def _inputs(self, pixels: Tensor) -> Tensor:
        if self.net == "mlp":
            return pixels.flatten(1)
        return F.pad(pixels, (2, 2, 2, 2)) - 0.5


@dataclass(frozen=True)
class Task:
    """Images, and those to be erased.

    Attributes:
        images: as the network takes them.
        erased: ids of the training images that go.
    """

    images: Images
    erased: Tensor

    @property
    def data(self) -> Data:
        """The model's call."""
        return Data.of((self.images.x, self.images.y), batch_size=2_000)

    @property
    def retained(self) -> Tensor:
        """Ids of the others."""
        kept = torch.ones(len(self.images.y), dtype=torch.bool)
        kept[self.erased] = False
        return kept.nonzero()[:, 0]


PRESETS = {
    "small": Settings(),
    "full": Settings(
        net="lenet",
        num_train=60_000,
        num_test=10_000,
        num_erased=6_000,
        num_steps=10_000,
        learning_rate=1e-3,
        prior_std=0.15,
    ),
}
