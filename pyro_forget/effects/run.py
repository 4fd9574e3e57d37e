"""Running a model at given latents and collecting its sites: the inner loop of every energy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_forget.effects.site import Site, make_site

Latents = dict[str, Tensor]
LOCAL = "local_reparametrization"


@dataclass(frozen=True)
class Answers:
    """What a run substitutes.

    Attributes:
        latents: values of the latent sites by name.
        unconstrained: whether `latents` are to be mapped into each site's support first.
        gaussians: (loc, scale) of sites that a locally reparametrised model may treat as a distribution.
        noise: standard normal values for auxiliary noise sites; a site without one is an error unless None.
    """

    latents: Mapping[str, Tensor]
    unconstrained: bool = False
    gaussians: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    noise: Mapping[str, Tensor] | None = None


def is_subsample(msg: Any) -> bool:
    """Whether this is the site by which a plate draws its own indices."""
    return isinstance(msg["fn"], _Subsample)


class Recorder(Messenger):
    """Answers latents and noise, collects every site, and stops: nothing outside sees the run.

    It stands outside the program's own handlers, which have put plates, masks and scales into each message before
    it arrives.
    """

    def __init__(self, answers: Answers, plate: str, data_scale: float = 1.0) -> None:
        super().__init__()
        self.answers, self.plate, self.data_scale = answers, plate, data_scale
        self.sites: list[Site] = []
        self.log_det: Tensor | float = 0.0
        self.noise_shapes: dict[str, torch.Size] = {}
        self.local_sites: set[str] = set()
        self.missing: list[str] = []

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or is_subsample(msg):
            return
        infer = msg["infer"] or {}
        if infer.get("_do_not_trace"):
            self._answer_noise(msg)
            return
        msg["stop"] = True
        if infer.get("_deterministic"):
            return
        if not msg["is_observed"]:
            self._answer_latent(msg)
        self.sites.append(make_site(msg, self.plate, self.data_scale))

    def _answer_latent(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.answers.latents:
            self.missing.append(name)
            raise KeyError(name)
        value = self.answers.latents[name]
        if self.answers.unconstrained:
            transform = biject_to(msg["fn"].support)
            constrained = transform(value)
            self.log_det = self.log_det + transform.log_abs_det_jacobian(value, constrained).sum()
            value = constrained
        msg["value"], msg["done"] = value, True
        if name in self.answers.gaussians:
            msg["infer"] = {**msg["infer"], LOCAL: self.answers.gaussians[name]}

    def _answer_noise(self, msg: Any) -> None:
        if not msg["infer"].get("is_auxiliary"):
            return
        name = msg["name"]
        self.noise_shapes[name] = msg["fn"].shape()
        self.local_sites.update(msg["infer"].get("weights", ()))
        if self.answers.noise is not None:
            msg["value"], msg["done"] = self.answers.noise[name], True
