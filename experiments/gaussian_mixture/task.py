"""The points, and which of them go."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from pyro_forget.data import Data

FILE = Path("gmm", "bif-gmm-2d.npz")


@dataclass(frozen=True)
class Task:
    """Points in the plane, and those to be erased.

    Attributes:
        points: float64, shape (point, 2); all that is fitted to them is where they are.
        component: which each came from, int64, shape (point,).
        erased: ids in the order in which they go, on the CPU.
    """

    points: Tensor
    component: Tensor
    erased: Tensor

    @staticmethod
    def published(root: Path | None, num_erased: int, seed: int) -> "Task":
        """The points of the paper's code, from ROOT/gmm or the folder that PYRO_FORGET_DATA names.

        Raises:
            FileNotFoundError: they are not there.
        """
        folder = root or os.environ.get("PYRO_FORGET_DATA")
        if folder is None or not (Path(folder) / FILE).exists():
            raise FileNotFoundError(
                f"{FILE} was not found under {folder or 'PYRO_FORGET_DATA, which is not set'}: name its folder by "
                "--data-root, or use --data simulated."
            )
        with np.load(Path(folder) / FILE) as held:
            points, component = torch.as_tensor(held["x"]).double(), torch.as_tensor(held["y"])
        return Task(points, component, _spoiled(points, component, num_erased, seed))

    @staticmethod
    def simulated(num_points: int, num_components: int, spread: float, num_erased: int, seed: int) -> "Task":
        """Centres from N(0, spread²·I), points from N(centre, I)."""
        generator = torch.Generator().manual_seed(seed)
        centres = spread * torch.randn(num_components, 2, generator=generator, dtype=torch.float64)
        component = torch.randint(num_components, (num_points,), generator=generator)
        points = centres[component] + torch.randn(num_points, 2, generator=generator, dtype=torch.float64)
        return Task(points, component, _spoiled(points, component, num_erased, seed))

    def to(self, device: str) -> "Task":
        """The same points on this device."""
        return replace(self, points=self.points.to(device))

    @property
    def data(self) -> Data:
        """The model's call."""
        return Data(self.points).to(self.points.device)

    @property
    def retained(self) -> Tensor:
        """Ids of the others."""
        kept = torch.ones(len(self.points), dtype=torch.bool)
        kept[self.erased] = False
        return kept.nonzero()[:, 0]

    @staticmethod
    def start(rows: Tensor, seed: int, num_components: int) -> Tensor:
        """Initial centres, shape (component, 2), by k-means++ (Arthur and Vassilvitskii 2007)."""
        centres, _ = kmeans_plusplus(rows.cpu().numpy(), num_components, random_state=seed)
        return torch.as_tensor(centres).to(rows)


def _spoiled(points: Tensor, component: Tensor, num_erased: int, seed: int) -> Tensor:
    """The right-hand points of component 0 and the lower points of component 2, half of each, in random order."""
    half = num_erased // 2
    chosen = []
    for number, axis, upper in ((0, 0, True), (min(2, int(component.max())), 1, False)):
        own = torch.nonzero(component == number)[:, 0]
        if len(own) < half:
            raise ValueError(f"Component {number} has {len(own)} points, fewer than {half}: lower --num-erased.")
        chosen.append(own[points[own, axis].argsort(descending=upper)[:half]])
    ids = torch.cat(chosen)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
