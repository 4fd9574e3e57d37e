"""The data of a posterior: the arguments of a model's call, row by row, with ids that survive splits."""

from pyro_forget.data.batch import MADE_UP, Batch
from pyro_forget.data.ids import Ids, Index, as_ids, positions_of
from pyro_forget.data.rows import DEFAULT_BATCH_SIZE, Data

__all__ = ["DEFAULT_BATCH_SIZE", "MADE_UP", "Batch", "Data", "Ids", "Index", "as_ids", "positions_of"]
