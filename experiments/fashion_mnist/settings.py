"""The settings of one cell of the study, and its presets."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.images import Images, load_images
from experiments.words import check_choices, option
from pyro_forget.data import Data
from pyro_forget.inference.recursion import Recursion
from pyro_forget.models import MLP, LeNet

ALLOWED = {
    "data": ("fashion_mnist", "mnist", "cifar10"),
    "net": ("mlp", "lenet"),
    "fit": ("svi", "sgld", "sghmc"),
    "optimiser": ("adam", "sgd"),
    "method": ("before", "default", "published", "finetune", "sampler", "retrain"),
}
# Published, one for each fit: "to be hand-tuned until the recursion converges".
SCALINGS = {"svi": 0.1, "sgld": 0.005, "sghmc": 0.05}
NUM_PIXELS = {"fashion_mnist": 28 * 28, "mnist": 28 * 28, "cifar10": 3 * 32 * 32}


@dataclass(frozen=True)
class Settings:
    """What a cell depends on, apart from its seed."""

    data: str = option("fashion_mnist", "fashion_mnist, mnist or cifar10 (10,000 images, JPEG).")
    net: str = option("mlp", "mlp (784-128-10; 3072-128-10 for cifar10) or lenet.")
    fit: str = option("svi", "svi, sgld or sghmc.")
    method: str = option("default", "before, default, published, finetune, sampler or retrain.")
    num_erased: int = option(200, "Images of class 0 that go, the first of a random order.")
    num_train: int = option(10_000, "Training images.")
    num_test: int = option(2_000, "Test images.")
    num_steps: int = option(3_120, "Of the fit.")
    optimiser: str = option("adam", "Of svi: sgd as published, or adam, for the fewer steps of the small preset.")
    learning_rate: float = option(2e-3, "Of Adam, decaying by a cosine.")
    guide_draws: int = option(1, "Draws a step of svi; 5 published, one to save time.")
    guide_std: float = option(0.05, "Of each weight where svi starts; 0.1 published, for a wider prior.")
    prior_std: float = option(0.1, "Of each weight; 0.15 published, for LeNet.")
    step_size: float = option(
        0.5, "Of SGD, SGLD and SGHMC, times 1 / N; that of SGD falls to a tenth every 4,000 steps."
    )
    decay: float = option(0.5, "Exponent of SGLD's and SGHMC's step sizes, (t + 1)^-decay.")
    friction: float = option(0.4, "Of SGHMC.")
    num_draws: int = option(
        20, "Draws of a chain that are kept, after num_steps; the published chain keeps its state alone."
    )
    thin: int = option(50, "Steps a draw.")
    scaling: float | None = option(None, "Of the published recursion; none is 0.1 for svi, 0.005 sgld, 0.05 sghmc.")
    recursion_steps: int = option(64, "T of the published recursion.")
    finetune_steps: int = option(390, "Of Adam in fine-tuning, of a guide or of every draw.")
    sampler_steps: int = option(200, "Of the fit's own sampler on the retained data, from where the draws stand.")
    data_root: str = option("", "Folder of the data; PYRO_FORGET_DATA where none is given.")
    download: bool = option(False, "Fetch the data where they are missing.")

    def __post_init__(self) -> None:
        """Refuse what would only fail after the fit."""
        check_choices(self, ALLOWED)
        if (self.fit, self.method) == ("svi", "sampler"):
            raise ValueError("A guide has no sampler to go on with: use --method finetune, or --fit sgld or sghmc.")

    @property
    def model(self) -> MLP | LeNet:
        """The network."""
        if self.net == "lenet":
            return LeNet(prior_std=self.prior_std)
        return MLP((NUM_PIXELS[self.data], 128, 10), self.prior_std)

    @property
    def recursion(self) -> Recursion:
        """The published one: batches of 128, five draws a product, 64 images at a time."""
        return Recursion(SCALINGS[self.fit] if self.scaling is None else self.scaling, self.recursion_steps)

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
        return F.interpolate(pixels, (32, 32), mode="bilinear") - 0.5


@dataclass(frozen=True)
class Task:
    """Images, and those to be erased.

    Attributes:
        images: as the network takes them; all that is fitted to them is where they are.
        erased: ids of the training images that go, on the CPU.
    """

    images: Images
    erased: Tensor

    def to(self, device: str) -> "Task":
        """The same images on this device."""
        return replace(self, images=self.images.to(device))

    @property
    def data(self) -> Data:
        """The model's call."""
        return Data.of((self.images.x, self.images.y), batch_size=2_000).to(self.images.x.device)

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
        optimiser="sgd",
        guide_draws=5,
        guide_std=0.1,
        prior_std=0.15,
    ),
}
