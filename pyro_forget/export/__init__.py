"""Everything leaves for ArviZ through here: a posterior as an `xarray.DataTree`, and files that every ArviZ opens."""

from pyro_forget.export.files import from_netcdf, to_inferencedata, to_netcdf
from pyro_forget.export.record import plain
from pyro_forget.export.tree import ROLES, join, to_datatree, variants

__all__ = ["ROLES", "from_netcdf", "join", "plain", "to_datatree", "to_inferencedata", "to_netcdf", "variants"]
