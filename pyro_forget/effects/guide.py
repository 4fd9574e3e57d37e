"""An adopted guide: latents and their log density as a function of its parameters and given noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import block
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_forget.data import Batch
from pyro_forget.effects.parameters import Parametrised
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.program import over_draws, quiet
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Latents, is_subsample
from pyro_forget.params import Params


@dataclass(frozen=True)
class GuideSite:
    """One sample site of a guide's run; `auxiliary` sites are the noise of autoguides, not latents."""

    name: str
    fn: Any
    value: Tensor
    auxiliary: bool
    frames: tuple[CondIndepStackFrame, ...]


@dataclass(frozen=True)
class GuideRun:
    """What one run of a guide drew."""

    sites: tuple[GuideSite, ...]

    @property
    def latents(self) -> Latents:
        """Constrained values by site."""
        return {site.name: site.value for site in self.sites if not site.auxiliary}

    def log_prob(self) -> Tensor:
        """Log q of the draw, scalar, nats; auxiliary sites and the log-Jacobian of their Deltas included."""
        terms = [site.fn.log_prob(site.value).sum() for site in self.sites]
        return torch.stack(terms).sum() if terms else torch.zeros(())


@dataclass(frozen=True)
class Guide:
    """A guide with the data plate of its model.

    Attributes:
        guide: the user's guide and its parameters.
        template: two made-up rows: a guide with global latents reads only their shapes.
        num_normals: standard normal numbers that one draw consumes; None where it uses other randomness, so that
            its noise can be pinned by seed only.
        vectorised: whether many draws can be made in one pass.
    """

    guide: Parametrised
    plate: str
    template: Batch
    num_normals: int | None
    vectorised: bool = True

    @staticmethod
    def rebuilt(
        guide: Callable[..., Any], plate: str, template: Batch, params: Params | None, seed: int = 0
    ) -> "Guide":
        """A guide from its code, the call it is first made with, and saved parameters (None: its first ones)."""
        with plate_rows(plate, torch.arange(len(template))), block(), forked_rng(seed):
            found = Parametrised.rebuilt(guide, lambda: guide(*template.args, **template.kwargs), params)
        return Guide.of(found, plate, template)

    @staticmethod
    def of(guide: Parametrised, plate: str, template: Batch) -> "Guide":
        """Find out how its noise can be pinned and whether it can be vectorised."""
        with quiet(), torch.no_grad():
            params = _trainable(guide.params)
            num_normals = count_normals(lambda noise: run_guide(guide, params, template, plate, noise))
            adopted = Guide(guide, plate, template, num_normals)
            return replace(adopted, vectorised=_vectorises(adopted))

    def run(self, params: Params, noise: Tensor | None, batch: Batch | None = None) -> GuideRun:
        """Draw once. `noise` of shape (num_normals,) stands in for every standard normal number; None: torch's RNG."""
        if self.vectorised:
            return run_guide(self.guide, params, batch or self.template, self.plate, noise)
        asked = torch.is_grad_enabled() and any(value.requires_grad for value in params.values())
        with torch.set_grad_enabled(asked):
            params = _trainable(self.guide.params | params)
            return run_guide(self.guide, params, batch or self.template, self.plate, noise)


def run_guide(guide: Parametrised, params: Params, batch: Batch, plate: str, noise: Tensor | None) -> GuideRun:
    """Run a guide on a batch and collect its sites."""
    recorder = _GuideRecorder()
    with plate_rows(plate, torch.arange(len(batch))), recorder:
        if noise is None:
            guide(params, batch.args, batch.kwargs)
        else:
            with _Normals(noise):
                guide(params, batch.args, batch.kwargs)
    return GuideRun(tuple(recorder.sites))


def count_normals(run: Callable[[Tensor | None], GuideRun]) -> int | None:
    """How many standard normal numbers a guide's draw consumes; None where other randomness enters as well."""
    with forked_rng(), _Normals(None) as counter:
        run(None)
    noise = torch.zeros(counter.count)
    draws = []
    for seed in (0, 1):
        with forked_rng(seed):
            draws.append(run(noise).latents)
    same = all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    return counter.count if same else None


def _vectorises(guide: Guide) -> bool:
    """Whether `vmap` goes through the guide; flows that register modules in the store do not let it."""
    if not guide.num_normals:
        return True
    noise, params = torch.zeros(2, guide.num_normals), _trainable(guide.guide.params)
    try:
        over_draws(lambda drawn: guide.run(params, drawn["noise"]).latents, {"noise": noise}, 2)
    except (RuntimeError, ValueError):
        return False
    return True


def _trainable(params: Params) -> Params:
    """Pyro registers a flow's tensors in its store, and warns about those that need no gradient."""
    return {
        name: value if value.requires_grad else value.detach().requires_grad_(True) for name, value in params.items()
    }


class _GuideRecorder(Messenger):
    """Collects the sites of a guide after they were drawn, and lets nothing outside see them."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[GuideSite] = []

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            msg["stop"] = True

    def _postprocess_message(self, msg: Any) -> None:
        infer = msg["infer"] or {}
        kept = msg["type"] == "sample" and not is_subsample(msg)
        if kept and not infer.get("_do_not_trace") and not infer.get("_deterministic"):
            auxiliary = bool(infer.get("is_auxiliary"))
            self.sites.append(GuideSite(msg["name"], msg["fn"], msg["value"], auxiliary, msg["cond_indep_stack"]))


class _Normals(TorchFunctionMode):
    """Answers every in-place standard normal draw with the next numbers of `noise`, or counts them.

    `torch.distributions` fills a fresh tensor in place, which `torch.func.vmap` cannot batch; a value that is handed
    over instead can be.
    """

    def __init__(self, noise: Tensor | None) -> None:
        super().__init__()
        self.noise, self.count = noise, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_normal = func is torch.Tensor.normal_ and len(args) == 1 and not kwargs
        start = self.count
        if is_normal:
            self.count += args[0].numel()
        if not is_normal or self.noise is None:
            return func(*args, **(kwargs or {}))
        return self.noise[start : self.count].reshape(args[0].shape).to(args[0])
