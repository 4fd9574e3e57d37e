"""A posterior as an `xarray.DataTree`.

The tree is built by `arviz_base.from_dict`, which is the same for ArviZ 0.x and 1.x. Draws of a guide are one chain:
ArviZ wants dims (chain, draw). Whatever the posterior's own form, the group `posterior` is equally weighted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from arviz_base import from_dict
from torch import Tensor
from xarray import DataTree

from pyro_forget.data import Data
from pyro_forget.export.observed import observed
from pyro_forget.export.record import library, provenance, record
from pyro_forget.importance import systematic_resample
from pyro_forget.outcome import Report
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

ROLES = {"before": "_before", "after": "", "refit": "_refit"}
_SAID = {"before": "before forgetting", "after": "after forgetting", "refit": "of the refit"}
_ROW = "datum"


def to_datatree(
    posterior: Posterior,
    data: Data,
    *,
    before: Posterior | None = None,
    refit: Posterior | None = None,
    report: Report | None = None,
    num_draws: int = 1000,
    seed: int = 0,
) -> DataTree:
    """A posterior, and what it is compared with, as ArviZ wants it.

    Groups: `posterior`, `log_likelihood` and, for draws evaluated on all their data, `sample_stats` with `lp`; the
    same with the suffixes `_before` and `_refit`; `observed_data`; `forgetting` with weights, k̂, effective sample
    size, sweeps and step lengths. Weighted draws are resampled systematically for `posterior`; as they are, in chain
    order, they stand in `posterior_weighted`, their log weights in `forgetting`. The root's attributes say where it
    all comes from. Nothing of the erased rows is in it but what they left in `before`.

    Args:
        posterior: the posterior after forgetting.
        data: the rows on which all posteriors are evaluated: the retained data, or some of them. The log likelihood
            holds draws × rows numbers for each posterior.
        before: the posterior that still holds the erased data.
        refit: the posterior of a fit to the retained data from scratch.
        report: what `forget` returned.
        num_draws: draws from a guide. Draws that exist already are all exported.
        seed: of the guide's draws and of resampling.

    Raises:
        ValueError: a posterior does not hold all of `data` or has no draws, or the posteriors differ in their sites.
    """
    given = {"after": posterior, "before": before, "refit": refit}
    views = {role: _view(value, role, data, num_draws, seed) for role, value in given.items() if value is not None}
    _check_sites(views)
    seen = _arrays(observed(posterior, data))
    name = next(iter(seen)) if len(seen) == 1 else "y"
    groups = {group: values for role, view in views.items() for group, values in view.groups(ROLES[role], name).items()}
    tree = from_dict(
        groups | ({"observed_data": seen} if seen else {}),
        dims={variable: [_ROW] for variable in (name, *seen)},
        coords={_ROW: _array(data.ids)},
        attrs={"/": provenance(posterior, report)},
    )
    numbers = record(views["after"].log_weights, report)
    return tree.assign({"forgetting": DataTree(numbers)}) if numbers.variables else tree


def variants(tree: DataTree) -> dict[str, DataTree]:
    """`before`, `after` and `refit`, as far as the tree has them, as trees of their own.

    Each has the groups `posterior` and `log_likelihood` under these names: what `plot_forest`, `loo` and `compare` of
    ArviZ take for several models. All are evaluated on the same data.
    """
    groups = ("posterior", "log_likelihood")
    return {
        role: DataTree.from_dict({group: tree[group + suffix].to_dataset() for group in groups})
        for role, suffix in ROLES.items()
        if "posterior" + suffix in tree.children
    }


def join(trees: Mapping[str, DataTree], title: str) -> DataTree:
    """One tree of several: each becomes a branch under its name, with its attributes."""
    root = DataTree(children=dict(trees))
    root.attrs = library() | {"title": title}
    return root


@dataclass(frozen=True)
class _View:
    """One posterior in ArviZ's shapes: latents (chain, draw, *site), log_likelihood (chain, draw, datum).

    `weighted` are the latents in chain order as they belong to `log_weights`; the other fields are equally weighted.
    """

    latents: dict[str, np.ndarray]
    log_likelihood: np.ndarray
    lp: np.ndarray | None = None
    weighted: dict[str, np.ndarray] | None = None
    log_weights: np.ndarray | None = None

    def groups(self, suffix: str, observed: str) -> dict[str, dict[str, np.ndarray]]:
        """The groups of `arviz_base.from_dict`; those without variables are left out."""
        groups = {
            f"posterior{suffix}": self.latents,
            f"posterior{suffix}_weighted": self.weighted,
            f"log_likelihood{suffix}": {observed: self.log_likelihood},
            f"sample_stats{suffix}": None if self.lp is None else {"lp": self.lp},
        }
        return {name: values for name, values in groups.items() if values is not None}

    def resampled(self, rows: np.ndarray, log_weights: np.ndarray) -> "_View":
        """The same draws, equally weighted: one chain of the draws with these numbers."""

        def take(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, *values.shape[2:])[rows][None]

        latents = {name: take(value) for name, value in self.latents.items()}
        lp = None if self.lp is None else take(self.lp)
        return _View(latents, take(self.log_likelihood), lp, self.latents, log_weights)


def _view(posterior: Posterior, role: str, data: Data, num_draws: int, seed: int) -> _View:
    unknown = np.setdiff1d(_array(data.ids), _array(posterior.ids))
    if len(unknown):
        raise ValueError(
            f"The posterior {_SAID[role]} does not hold {len(unknown)} of the {len(data)} rows in `data`, such as id "
            f"{unknown[0]}. Evaluate all posteriors on the retained data, or on some of them."
        )
    if isinstance(posterior, SampledPosterior):
        return _sampled_view(posterior, data, seed)
    if isinstance(posterior, VariationalPosterior):
        latents = {name: value[None] for name, value in posterior.draws(num_draws, seed).items()}
        return _View(_arrays(latents), _array(posterior.log_likelihood(data, num_draws, seed)))
    raise ValueError(f"{type(posterior).__name__} has no draws to export: give it a model, with a guide or with draws.")


def _sampled_view(posterior: SampledPosterior, data: Data, seed: int) -> _View:
    complete = data.num_data == posterior.num_data
    lp = _array(posterior.log_joint(posterior.params, data)) if complete else None
    view = _View(_arrays(posterior.latents), _array(posterior.log_likelihood(data)), lp)
    if posterior.log_weights is None:
        return view
    rows = systematic_resample(posterior.log_weights, posterior.num_draws, seed)
    return view.resampled(_array(rows), _array(posterior.log_weights))


def _check_sites(views: Mapping[str, _View]) -> None:
    shapes = {role: {name: value.shape[2:] for name, value in view.latents.items()} for role, view in views.items()}
    for role, found in shapes.items():
        if found != shapes["after"]:
            raise ValueError(
                f"The posterior {_SAID[role]} has the sites {found}, the one after forgetting {shapes['after']}: only "
                "posteriors of one model can be compared."
            )


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays by name; netCDF keeps "/" for groups, so `scope`'s names are written with a dot."""
    arrays = {name.replace("/", "."): _array(value) for name, value in tensors.items()}
    if len(arrays) < len(tensors):
        raise ValueError(f"Of the sites {sorted(tensors)} two have one name once '/' is written as '.': rename one.")
    return arrays


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
