"""How good draws are before anything is forgotten: R-hat and effective sample size."""

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyro_forget.posterior import SampledPosterior

_COORDINATES_CHECKED = 32  # of R-hat and ESS, 1 ms each; evenly spaced
_GOOD_RHAT, _GOOD_ESS = 1.01, 400  # Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), section 4


def input_health(posterior: SampledPosterior) -> tuple[float | None, float | None]:
    """(largest R-hat, smallest bulk ESS) of the draws as they came; a single chain is cut in two. None if too short."""
    chains = _some_coordinates(posterior).cpu().numpy()
    if chains.shape[2] < 8:
        return None, None
    if chains.shape[1] == 1:
        half = chains.shape[2] // 2
        chains = chains[:, :, : 2 * half].reshape(len(chains), 2, half)
    with np.errstate(all="ignore"):
        rhat = array_stats.rhat(chains, chain_axis=1, draw_axis=2)
        ess = array_stats.ess(chains, chain_axis=1, draw_axis=2)
    finite = [float(value) for value in rhat if np.isfinite(value)]  # a coordinate that never moves has none
    return max(finite, default=None), float(ess.min()) if np.isfinite(ess).all() else None


def _some_coordinates(posterior: SampledPosterior) -> Tensor:
    """Some of the coordinates, evenly spaced over all sites, (coordinate, chain, draw), float64."""
    sites = [value.detach().reshape(*posterior.shape, -1) for value in posterior.params.values() if value.numel()]
    sizes = torch.tensor([site.shape[2] for site in sites])
    total, starts = int(sizes.sum()), sizes.cumsum(0) - sizes
    places = torch.linspace(0, total - 1, min(total, _COORDINATES_CHECKED)).round().long()
    picked = [
        site[:, :, (places[(places >= start) & (places < start + site.shape[2])] - start).to(site.device)]
        for site, start in zip(sites, starts.tolist(), strict=True)
    ]
    return torch.cat([part.double() for part in picked], 2).permute(2, 0, 1)


def health_warnings(rhat: float | None, ess: float | None) -> tuple[str, ...]:
    """What is wrong with the draws before anything is forgotten."""
    shown = [f"R-hat {rhat:.3f}"] if rhat is not None and rhat >= _GOOD_RHAT else []
    shown += [f"an effective sample size of {ess:.0f}"] if ess is not None and ess < _GOOD_ESS else []
    if not shown:
        return ()
    return (f"The draws came with {' and '.join(shown)}: forgetting carries their error over. Sample longer first.",)
