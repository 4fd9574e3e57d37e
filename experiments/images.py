"""Image data sets as tensors, read where they lie."""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
CIFAR10 = Path("cifar10-jpeg", "cifar10_jpegq75_10k_2k.npz")


@dataclass(frozen=True)
class Images:
    """Images to fit and to test; pixels in [0, 1].

    Attributes:
        x, y: shape (image, channel, height, width), of the default type, and (image,), int64.
        x_test, y_test: likewise.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: str) -> "Images":
        """The same on this device."""
        return Images(*(part.to(device) for part in (self.x, self.y, self.x_test, self.y_test)))

    def subset(self, num_train: int, num_test: int, seed: int) -> "Images":
        """So many of each, chosen at random.

        Raises:
            ValueError: there are fewer.
        """
        for name, wanted, there in (("train", num_train, len(self.y)), ("test", num_test, len(self.y_test))):
            if wanted > there:
                raise ValueError(f"The data have {there} images to {name}: --num-{name} {wanted} is more.")
        generator = torch.Generator().manual_seed(seed)
        train = torch.randperm(len(self.y), generator=generator)[:num_train]
        test = torch.randperm(len(self.y_test), generator=generator)[:num_test]
        return Images(self.x[train], self.y[train], self.x_test[test], self.y_test[test])


def load_images(name: str, root: str | Path | None = None, download: bool = False) -> Images:
    """mnist, fashion_mnist or cifar10 (a JPEG copy of a sixth of it, not comparable digit for digit).

    Args:
        name: of the data set.
        root: holds MNIST/raw, FashionMNIST/raw or cifar10-jpeg; PYRO_FORGET_DATA where none is given.
        download: fetch MNIST or Fashion-MNIST by torchvision into `root`, where they are missing.

    Raises:
        FileNotFoundError: the files are not there.
    """
    folder = root or os.environ.get("PYRO_FORGET_DATA")
    if folder is None:
        raise FileNotFoundError(f"No folder for {name}: name one by --data-root or PYRO_FORGET_DATA.")
    if name == "cifar10":
        return _cifar10(Path(folder) / CIFAR10)
    raw = Path(folder) / FOLDERS[name] / "raw"
    if not (raw / "train-images-idx3-ubyte.gz").exists() and download:
        _download(name, Path(folder))
    parts = {
        part: (read_idx(raw / f"{part}-images-idx3-ubyte.gz"), read_idx(raw / f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    }
    (x, y), (x_test, y_test) = parts["train"], parts["t10k"]
    return Images(_pixels(x)[:, None], y.long(), _pixels(x_test)[:, None], y_test.long())


def _pixels(values: Tensor) -> Tensor:
    return values.to(torch.get_default_dtype()) / 255


def read_idx(path: Path) -> Tensor:
    """One file of the idx format: two zero bytes, type, number of dims, the dims as big-endian int32, the values."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name its root by --data-root, or pass --download.")
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy())


def _cifar10(path: Path) -> Images:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name its root by --data-root.")
    with np.load(path) as held:
        x, x_test = (
            _pixels(torch.from_numpy(held[part])).permute(0, 3, 1, 2).contiguous() for part in ("x_train", "x_test")
        )
        y, y_test = (torch.from_numpy(held[part]).long() for part in ("y_train", "y_test"))
    return Images(x, y, x_test, y_test)


def _download(name: str, folder: Path) -> None:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    kind(str(folder), download=True)
