"""Draws of MCMC, taken over in one line."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import biject_to

from pyro_forget.data import Batch, Data
from pyro_forget.effects.adoption import adopt_model, check_rows, latent_shapes
from pyro_forget.effects.parameters import unconditioned
from pyro_forget.effects.program import Program, over_draws, quiet
from pyro_forget.effects.run import Answers, Latents
from pyro_forget.energy import SampledEnergy
from pyro_forget.importance import systematic_resample
from pyro_forget.params import Params, clone
from pyro_forget.posterior.call import beside, decode_program, encode_program, refuse_other_ids
from pyro_forget.store import digest, load_tensors, save_tensors

KIND = "sampled"
# Of draws evaluated in one pass, times rows, and in all: memory is bounded whatever their number.
_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 1 << 16, 2_000_000


class SampledPosterior:
    """An existing MCMC run: model, draws, and the data.

    Args:
        model: the Pyro model, as it was sampled (already reparametrised, if it was).
        draws: constrained values by site, (chain, draw, *site): `MCMC.get_samples(group_by_chain=True)`; or a list of
            chains of one length.
        data: the model's call as `Data`; only the ids of its rows are kept.
        plate: the name of the data plate.
        minibatch_scale: the model scales its data by N/B itself; take that out.

    Raises:
        ValueError: the model cannot be taken over, or the draws are not of its latents; the message says why.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Mapping[str, Tensor | Sequence[Tensor]],
        data: Data,
        *,
        plate: str = "data",
        minibatch_scale: bool = False,
    ) -> None:
        learned = adopt_model(model, data, plate, minibatch_scale=minibatch_scale)
        # Draws are of the latents alone: learned parameters of the model stay as they are.
        program = replace(learned, model=learned.model.frozen(learned.model.free))
        latents = checked_draws(draws, latent_shapes(program, next(data.batches())))
        check_rows(program, data, {name: value[0, 0] for name, value in latents.items()})
        self._assemble(program, unconstrain(program, latents), data.ids)

    def _assemble(self, program: Program, cloud: Params, ids: Tensor) -> None:
        shapes = {name: value.shape[2:] for name, value in cloud.items()}
        self.energy = SampledEnergy(program, shapes)
        self.params: Params = clone(cloud)
        self.log_weights: Tensor | None = None
        self.ids = ids
        self.parent: str | None = None

    @property
    def num_data(self) -> int:
        """How many rows."""
        return len(self.ids)

    @property
    def num_draws(self) -> int:
        """Draws over all chains."""
        chains, draws = self.shape
        return chains * draws

    @property
    def shape(self) -> tuple[int, int]:
        """(chains, draws a chain)."""
        value = next(iter(self.params.values()))
        return value.shape[0], value.shape[1]

    @property
    def model(self) -> Callable[..., Any]:
        """The model; with its learned parameters, as they were when it was taken over, where it has any."""
        model = self.energy.program.model
        return model.edited({}) if model.tensors else model.program

    @cached_property
    def latents(self) -> Latents:
        """The draws in the sites' supports, in chain order: (chain, draw, *site); `log_weights` belong to them."""
        with torch.no_grad():
            return self.energy.constrain(self.params)

    @property
    def digest(self) -> str:
        """SHA-256 over draws, weights and ids, in hex; the same on every platform."""
        return digest({**self.params, **self._weights(), "ids": self.ids}, {"kind": KIND})

    def edited(
        self, params: Params, ids: Tensor, log_weights: Tensor | None = None, *, take: bool = False
    ) -> "SampledPosterior":
        """A new posterior of other draws and rows.

        Args:
            params: unconstrained draws, (chain, draw, *site).
            ids: its rows.
            log_weights: (chain, draw), normalised here; None for equal weights.
            take: keep the tensors themselves instead of copies: nobody else may change them.
        """
        new = copy.copy(self)
        new.__dict__.pop("latents", None)
        new.params, new.ids, new.parent = params if take else clone(params), ids.clone(), self.digest
        weights = None if log_weights is None else log_weights.detach().double()
        new.log_weights = None if weights is None else weights - weights.logsumexp((0, 1))
        return new

    def draws(self, num_draws: int | None = None, seed: int = 0) -> Latents:
        """Equally weighted draws, each of shape (num_draws, *site); all of them, in chain order, by default.

        Weighted draws are resampled systematically; fewer than there are, are spread evenly over the chains.
        """
        if num_draws is not None and num_draws < 1:
            raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
        flat = {name: value.flatten(0, 1) for name, value in self.latents.items()}
        if self.log_weights is not None:
            chosen = systematic_resample(self.log_weights.flatten(), num_draws or self.num_draws, seed)
        elif num_draws is None or num_draws == self.num_draws:
            return flat
        else:
            chosen = torch.linspace(0, self.num_draws - 1, num_draws).round().long()
        return {name: value[chosen.to(value.device)] for name, value in flat.items()}

    def log_likelihood(self, data: Data) -> Tensor:
        """Log likelihood of each datum under each draw, summed over sites; shape (chain, draw, rows), nats."""
        flat = {name: value.flatten(0, 1)[None] for name, value in self.params.items()}
        entries = sum(value[0, 0].numel() for value in flat.values())

        def of(batch: Batch) -> Tensor:
            size = max(1, min(_ROWS_AT_ONCE // len(batch), _NUMBERS_AT_ONCE // max(entries, 1)))
            parts = [
                self.energy.log_likelihood_of({n: v[:, first : first + size] for n, v in flat.items()}, batch)
                for first in range(0, self.num_draws, size)
            ]
            return torch.cat(parts, 1).reshape(*self.shape, len(batch))

        with torch.no_grad():
            return data.gather(of)

    def log_joint(self, params: Params, data: Data) -> Tensor:
        """Log p(θ, data) of unconstrained draws, log-Jacobian included; shape (chain, draw), nats, float64."""
        return self.energy.log_joint(params, data)

    def predictive(self, num_samples: int | None = None) -> Predictive:
        """Pyro's `Predictive` of equally weighted draws; observed values passed to it are ignored."""
        return Predictive(unconditioned(self.model), self.draws(num_samples))

    def save(self, path: str | Path) -> Path:
        """Write draws, weights and ids to one safetensors file, with a checksum; the model is code and stays out."""
        about, held = encode_program(self.energy.program)
        header = {"kind": KIND, "parent": self.parent, "sites": list(self.params), **about}
        tensors = {f"draws/{name}": value for name, value in self.params.items()}
        return save_tensors(path, {**tensors, **held, **self._weights(), "ids": self.ids}, header)

    @staticmethod
    def load(path: str | Path, model: Callable[..., Any], data: Data | None = None) -> "SampledPosterior":
        """Read a saved posterior; the model is the code it was sampled with.

        Raises:
            ValueError: the file is damaged or of another kind, or model or data do not fit it.
        """
        tensors, header = load_tensors(path)
        if header.get("kind") != KIND:
            raise ValueError(f"{path} holds a {header.get('kind')!r} posterior: load it with the class it came from.")
        tensors = beside(tensors, data)
        program = decode_program(header, tensors, path, model, data, {})
        posterior = object.__new__(SampledPosterior)
        posterior._assemble(program, {name: tensors[f"draws/{name}"] for name in header["sites"]}, tensors["ids"])
        posterior.parent, posterior.log_weights = header["parent"], tensors.get("log_weights")
        if data is not None:
            refuse_other_ids(data, posterior.ids, path)
            check_rows(program, data, {name: value[0, 0] for name, value in posterior.latents.items()})
        return posterior

    def _weights(self) -> dict[str, Tensor]:
        return {} if self.log_weights is None else {"log_weights": self.log_weights}


def unconstrain(program: Program, latents: Latents) -> Params:
    """Draws in unconstrained space: each site by `biject_to` the support it has at that draw."""
    template = program.template

    def of(values: Latents) -> tuple[Params, Latents]:
        sites = [site for site in program.run(template, Answers(values)).sites if not site.observed]
        transforms = {site.name: biject_to(site.fn.support) for site in sites}
        found = {name: transform.inv(values[name]) for name, transform in transforms.items()}
        return found, {name: transforms[name](value) for name, value in found.items()}

    lead = next(iter(latents.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in latents.items()}
    with torch.no_grad(), quiet():
        found, back = over_draws(of, flat, lead[0] * lead[1])
    # Some inverses clamp what lies outside, so a finite value alone says little.
    bad = [
        name
        for name, value in found.items()
        if not (torch.isfinite(value).all() and torch.allclose(back[name], flat[name], rtol=1e-3, atol=1e-3))
    ]
    if bad:
        raise ValueError(f"Draws of {bad} lie outside or on the edge of the site's support.")
    return {name: value.unflatten(0, lead) for name, value in found.items()}


def checked_draws(draws: Mapping[str, Tensor | Sequence[Tensor]], shapes: Mapping[str, torch.Size]) -> Latents:
    """The draws in the order of the model's latents.

    Raises:
        ValueError: a site is missing, unknown or misshapen, or the sites differ in chains and draws.
    """
    if not shapes:
        raise ValueError("The model has no latents, so it has no draws: take it over with an empty guide.")
    missing, unknown = sorted(set(shapes) - set(draws)), sorted(set(draws) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"The draws must be of the model's latents {sorted(shapes)}: missing {missing}, unknown {unknown}."
        )
    leads, found = set(), {name: _one_tensor(name, draws[name]) for name in shapes}
    for name, shape in shapes.items():
        value = found[name]
        if value.ndim == len(shape) + 1 and value.shape[1:] == shape:
            raise ValueError(
                f"Draws of '{name}' have shape {tuple(value.shape)}, without a chain dim: use "
                "`MCMC.get_samples(group_by_chain=True)`, or add one with `value[None]`."
            )
        if value.ndim != len(shape) + 2 or value.shape[2:] != shape:
            raise ValueError(
                f"Draws of '{name}' have shape {tuple(value.shape)}; (chain, draw, *{tuple(shape)}) is needed."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"Draws of '{name}' are not all finite: a chain diverged, or was padded to the length of "
                "the others. Leave its draws out, or cut all chains to the shortest."
            )
        leads.add(tuple(value.shape[:2]))
    if len(leads) > 1:
        raise ValueError(f"The sites have different numbers of chains and draws: {sorted(leads)}.")
    return found


def _one_tensor(name: str, draws: Any) -> Tensor:
    """Draws as one tensor; chains may come one by one."""
    if isinstance(draws, list | tuple):
        lengths = [len(chain) for chain in draws]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The chains of '{name}' have different lengths, {lengths}: cut all to the shortest, "
                f"`chain[:{min(lengths)}]`."
            )
        return torch.stack([torch.as_tensor(chain) for chain in draws]).detach()
    return torch.as_tensor(draws).detach()
