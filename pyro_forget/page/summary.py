"""An exported tree in numbers: which parameters moved and how far, how well the data are predicted."""

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.special import logsumexp
from xarray import DataTree

from pyro_forget.export import ROLES

_QUANTILES = (0.03, 0.25, 0.75, 0.97)


@dataclass(frozen=True)
class Marginal:
    """One parameter under one posterior: mean, sd, and the central 50 % and 94 % intervals."""

    mean: float
    sd: float
    inner: tuple[float, float]
    outer: tuple[float, float]


@dataclass(frozen=True)
class Parameter:
    """One scalar parameter under each posterior.

    Attributes:
        marginals: by role (before, after, refit).
        divergence: KL(after ‖ before) of Gaussians with the marginals' moments, nats; 0 without a before.
    """

    name: str
    marginals: dict[str, Marginal]
    divergence: float


@dataclass(frozen=True)
class Likelihood:
    """Log predictive density of the common evaluation data under one posterior.

    Attributes:
        mean: over the data, nats.
        se: its standard error over the data.
        by_datum: shape (datum,).
    """

    mean: float
    se: float
    by_datum: np.ndarray


@dataclass(frozen=True)
class Gap:
    """How far the means lie from the refit's, in standard deviations of the refit.

    Attributes:
        typical, largest: median and maximum over all parameters, by role (before, after).
        noise: what either would be about from the finite number of draws alone, were they independent.
    """

    typical: dict[str, float]
    largest: dict[str, float]
    noise: float


def roles(tree: DataTree) -> list[str]:
    """Those of before, after and refit that the tree holds, in this order."""
    return [role for role, suffix in ROLES.items() if f"posterior{suffix}" in tree.children]


def parameters(tree: DataTree, most: int = 12) -> list[Parameter]:
    """The `most` parameters that moved farthest, farthest first; without a before the first ones."""
    divergence = _divergences(tree)
    order = np.argsort(-divergence, kind="stable")[:most]
    return [_parameter(tree, *_place(tree, int(flat)), float(divergence[flat])) for flat in order]


def num_parameters(tree: DataTree) -> int:
    """The number of scalar parameters."""
    return int(sum(value[0, 0].size for value in _posterior(tree, "after").values()))


def likelihoods(tree: DataTree) -> dict[str, Likelihood]:
    """Log predictive densities by role, all on the same data."""
    return {role: _likelihood(tree, role) for role in roles(tree)}


def gap(tree: DataTree) -> Gap | None:
    """The distance of the means to the refit's; None without a refit."""
    if "refit" not in roles(tree):
        return None
    refit = _moments(tree, "refit")
    away = {}
    for role in roles(tree)[:-1]:
        mean, _ = _moments(tree, role)
        away[role] = np.abs(mean - refit[0]) / np.where(refit[1] > 0, refit[1], 1.0)
    num_draws = [_num_draws(tree, role) for role in ("after", "refit")]
    return Gap(
        typical={role: float(np.median(value)) for role, value in away.items()},
        largest={role: float(value.max()) for role, value in away.items()},
        noise=float(np.sqrt(sum(1 / count for count in num_draws))),
    )


def _divergences(tree: DataTree) -> np.ndarray:
    """KL(after ‖ before) of each scalar parameter, by Gaussian moments."""
    mean, sd = _moments(tree, "after")
    if "before" not in roles(tree):
        return np.zeros(len(mean))
    mean0, sd0 = _moments(tree, "before")
    with np.errstate(divide="ignore", invalid="ignore"):  # a parameter without spread: nothing to divide by
        kl = 0.5 * ((sd / sd0) ** 2 + ((mean - mean0) / sd0) ** 2 - 1) - np.log(sd / sd0)
    return np.nan_to_num(kl, nan=0.0, posinf=np.finfo(float).max)


def _place(tree: DataTree, flat: int) -> tuple[str, tuple[int, ...]]:
    """The site and the index within it of the parameter with this number."""
    for name, value in _posterior(tree, "after").items():
        shape = value.shape[2:]
        if flat < math.prod(shape):
            return name, tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()
        flat -= math.prod(shape)
    raise IndexError(f"There are {num_parameters(tree)} parameters.")


def _parameter(tree: DataTree, site: str, index: tuple[int, ...], divergence: float) -> Parameter:
    draws = {role: _posterior(tree, role)[site] for role in roles(tree)}
    place = dict(zip(draws["after"].dims[2:], index, strict=True))
    labels = [str(draws["after"][dim].values[i]) for dim, i in place.items()]
    marginals = {role: _marginal(value.isel(place).values) for role, value in draws.items()}
    return Parameter(f"{site}[{', '.join(labels)}]" if labels else site, marginals, divergence)


def _marginal(draws: np.ndarray) -> Marginal:
    low, lower, upper, high = map(float, np.quantile(draws, _QUANTILES))
    return Marginal(float(draws.mean()), float(draws.std(ddof=1)), (lower, upper), (low, high))


def _moments(tree: DataTree, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all scalar parameters, flat, in the order of the sites."""
    flat = [value.values.reshape(_num_draws(tree, role), -1) for value in _posterior(tree, role).values()]
    return (
        np.concatenate([value.mean(0, dtype=np.float64) for value in flat]),
        np.concatenate([value.std(0, ddof=1, dtype=np.float64) for value in flat]),
    )


def _likelihood(tree: DataTree, role: str) -> Likelihood:
    (draws,) = tree[f"log_likelihood{ROLES[role]}"].to_dataset().data_vars.values()
    flat = draws.values.reshape(_num_draws(tree, role), -1)
    by_datum = logsumexp(flat, axis=0) - math.log(len(flat))
    se = by_datum.std(ddof=1) / math.sqrt(len(by_datum)) if len(by_datum) > 1 else math.nan
    return Likelihood(float(by_datum.mean()), float(se), by_datum)


def _posterior(tree: DataTree, role: str) -> dict[str, xr.DataArray]:
    return {str(name): value for name, value in tree[f"posterior{ROLES[role]}"].to_dataset().data_vars.items()}


def _num_draws(tree: DataTree, role: str) -> int:
    sizes = tree[f"posterior{ROLES[role]}"].sizes
    return sizes["chain"] * sizes["draw"]
