"""What can be said of draws without an acceptance rate."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from arviz_stats.base import array_stats
from xarray import Dataset, DataTree

MIN_DRAWS = 4
_MONITORED = 64
# Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and localization, section 4.
_MIXED = 1.01
_TAILS = (0.05, 0.95)
_NUMBERS = 2_000_000


@dataclass(frozen=True)
class Diagnostics:
    """How far chains agree, and how hot they are.

    Attributes:
        num_draws: of each chain.
        num_monitored: entries that R-hat and ESS were taken of: all of small sites, evenly spread ones of large.
        rhat: largest rank-normalised split R-hat; None with too few draws, one chain, or an entry that never moved.
        ess_bulk, ess_tail: least effective sample sizes over all chains; None with too few draws.
        kinetic_temperature: mean over draws and chains; None without momenta.
        configurational_temperature: the same.
        gradient_noise_scale: tr Cov(batch gradient)/|gradient|² at the end, mean over chains; None where infinite.
        warnings: what a reader should know.
        clipped: share of the steps after the warm-up whose gradient was cut to a length; None where none ever is.
    """

    num_draws: int
    num_monitored: int
    rhat: float | None
    ess_bulk: float | None
    ess_tail: float | None
    kinetic_temperature: float | None
    configurational_temperature: float | None
    gradient_noise_scale: float | None
    warnings: tuple[str, ...]
    clipped: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "warnings": list(self.warnings)}


def diagnose(tree: DataTree, noise_scale: float | None) -> Diagnostics:
    """Diagnostics of a tree with the groups `posterior` and `sample_stats`; a few entries are read at a time."""
    posterior, stats = tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset()
    num_chains, num_draws = posterior.sizes["chain"], posterior.sizes["draw"]
    rhats, bulks, tails, monitored = [], [], [], 0
    for values in _entries(posterior) if num_draws >= MIN_DRAWS else ():
        monitored += len(values)
        with np.errstate(all="ignore"):  # an entry that never moved has no R-hat
            rhats.append(np.max(array_stats.rhat(values, chain_axis=1, draw_axis=2)))
        bulks.append(np.min(array_stats.ess(values, chain_axis=1, draw_axis=2, method="bulk")))
        tails.append(np.min(array_stats.ess(values, chain_axis=1, draw_axis=2, method="tail", prob=_TAILS)))
    clipped = _number(stats["clipped"][:, -1].mean()) if "clipped" in stats and num_draws else None
    return Diagnostics(
        num_draws=num_draws,
        num_monitored=monitored,
        rhat=_number(np.max(rhats)) if rhats else None,
        ess_bulk=_number(np.min(bulks)) if bulks else None,
        ess_tail=_number(np.min(tails)) if tails else None,
        kinetic_temperature=_mean(stats, "kinetic_temperature"),
        configurational_temperature=_mean(stats, "configurational_temperature"),
        gradient_noise_scale=noise_scale,
        warnings=(*_warnings(num_chains, num_draws, rhats), *_law_warnings(clipped)),
        clipped=clipped,
    )


def _warnings(num_chains: int, num_draws: int, rhats: list[Any]) -> Iterator[str]:
    if num_draws < MIN_DRAWS:
        yield f"R-hat and ESS need at least {MIN_DRAWS} draws of each chain, got {num_draws}: raise `num_samples`."
    elif num_chains == 1:
        yield "R-hat needs at least 2 chains, got 1: raise `num_chains`; one chain cannot see a mode it never left."
    elif not np.isfinite(np.max(rhats)):
        yield "R-hat is undefined: an entry did not move in half of a chain; raise `thin` or the step size."
    elif np.max(rhats) > _MIXED:
        yield f"R-hat is {np.max(rhats):.3f}, above {_MIXED}: the chains have not mixed; raise `num_samples` or `thin`."


def _law_warnings(clipped: float | None) -> Iterator[str]:
    if clipped:
        yield (
            f"At {clipped:.2%} of the steps the gradient was cut to `max_gradient_norm`: there the chains follow "
            "another law than the posterior; raise it, or start nearer to a mode."
        )


def _entries(posterior: Dataset) -> Iterator[np.ndarray]:
    """Monitored entries, (entry, chain, draw), so many at a time that memory does not grow with the draws."""
    together = max(1, _NUMBERS // (posterior.sizes["chain"] * posterior.sizes["draw"]))
    for name in posterior.data_vars:
        array = posterior[name]
        shape = array.shape[2:]
        size = int(np.prod(shape, dtype=int))
        chosen = np.unique(np.linspace(0, size - 1, min(size, _MONITORED)).round().astype(int))
        for start in range(0, len(chosen), together):
            places = np.unravel_index(chosen[start : start + together], shape) if shape else ()
            yield np.stack(_read(array, places, len(chosen[start : start + together])))


def _read(array: Any, places: Any, count: int) -> list[np.ndarray]:
    """Traces of these places, (chain, draw) each; a block of draws is read once for all of them."""
    if not places:
        return [np.asarray(array, dtype=float)]
    blocks = []
    # Blocks as they lie on the disk, so that each is read once.
    rows = int(array.encoding["chunks"][1])
    for first in range(0, array.sizes["draw"], rows):
        block = np.asarray(array.isel(draw=slice(first, first + rows)))
        blocks.append(block[(slice(None), slice(None), *places)].astype(float))
    whole = np.concatenate(blocks, axis=1)
    return [whole[:, :, place] for place in range(count)]


def _mean(stats: Dataset, name: str) -> float | None:
    return _number(np.asarray(stats[name]).mean()) if name in stats and stats.sizes["draw"] else None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
