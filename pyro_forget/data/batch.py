"""The model's call for some rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The id of a row that stands for none: an owner's own ids may be any other number, negative ones too.
MADE_UP = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Batch:
    """The model's call for some rows.

    Attributes:
        args, kwargs: the arguments of the call.
        ids: int64, shape (rows,): who these rows are.
        rows: int64, shape (rows,): where they stand in the data set as it was first given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.ids)
