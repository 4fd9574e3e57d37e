"""A guide that was fitted to data, taken over in one line."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.adoption import adopt_guide, adopt_model, check_rows, start_guide, start_model
from pyro_forget.effects.guide import Guide
from pyro_forget.effects.parameters import fresh_copy, loaded_store, unconditioned
from pyro_forget.effects.program import Program, latents_log_likelihood, over_draws, quiet
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Latents
from pyro_forget.energy import VariationalEnergy, value_and_gradient, variational_energy
from pyro_forget.energy.variational import MODEL_PREFIX, first_draw, guide_part, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, clone
from pyro_forget.posterior.call import beside, decode_program, encode_program, refuse_other_ids
from pyro_forget.store import digest, load_tensors, save_tensors

KIND = "variational"
_FIXED = "fixed/"


class VariationalPosterior:
    """An existing SVI run: model, trained guide, and the data it was trained on.

    Args:
        model: the Pyro model.
        guide: the fitted guide, an autoguide, a PyroModule or a function; never changed.
        data: the model's call as `Data`; only the ids of its rows are kept.
        plate: the name of the data plate.
        minibatch_scale: the model scales its data by N/B itself; take that out.
        freeze: learned parameters of the model that stay as they are.

    Raises:
        ValueError: the program cannot be taken over; the message says why and what to do.

    Example:
        >>> posterior = VariationalPosterior(model, guide, Data(x, y))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Data,
        *,
        plate: str = "data",
        minibatch_scale: bool = False,
        freeze: tuple[str, ...] = (),
    ) -> None:
        program = adopt_model(model, data, plate, minibatch_scale=minibatch_scale, freeze=freeze)
        adopted = adopt_guide(guide, data, program)
        check_rows(program, data, first_draw(adopted).latents)
        self._assemble(program, adopted, data.ids)
        _every_entry_matters(self.energy, self.params, next(data.batches()))

    @staticmethod
    def started(
        model: Callable[..., Any], guide: Callable[..., Any], data: Data, *, plate: str = "data", seed: int = 0
    ) -> "VariationalPosterior":
        """The posterior that a fit starts from: guide and model as they are, or, never fitted, as they are first made.

        The user's guide and the parameter store are left as they were.
        """
        program = start_model(model, data, plate, seed)
        adopted = start_guide(guide, data, program, seed)
        check_rows(program, data, first_draw(adopted).latents)
        posterior = object.__new__(VariationalPosterior)
        posterior._assemble(program, adopted, data.ids)
        return posterior

    def with_params(self, params: Params) -> "VariationalPosterior":
        """The same rows, other parameters, no parent: a fit, not an edit."""
        new = self.edited(params, self.ids)
        new.parent = None
        return new

    def _assemble(self, program: Program, guide: Guide, ids: Tensor) -> None:
        self.energy: VariationalEnergy = variational_energy(program, guide, ids)
        self.params: Params = clone(guide.guide.params) | {
            MODEL_PREFIX + name: value for name, value in clone(program.model.params).items()
        }
        self.ids = ids
        self.parent: str | None = None
        self._guide: Callable[..., Any] | None = None

    @property
    def num_data(self) -> int:
        """How many rows."""
        return len(self.ids)

    @property
    def gaussian(self) -> Gaussian | None:
        """The guide's Gaussian over the unconstrained latents, None where it is not one."""
        view = self.energy.whole.view
        return None if view is None else view.read(guide_part(self.params)).detach()

    @property
    def guide(self) -> Callable[..., Any]:
        """A guide of its own with these parameters, for `Predictive`, `.median()` and further SVI.

        A deep copy under fresh names, without the rows that the fitted guide remembers; a function guide is wrapped
        in its own parameter store (train it within `loaded()`).
        """
        if self._guide is None:
            self._guide = self._program.guide.guide.edited(guide_part(self.params))
        return self._guide

    @property
    def model(self) -> Callable[..., Any]:
        """The model; with its learned parameters where it has any."""
        model = self._program.program.model
        return model.edited(model_part(self.params)) if model.tensors else model.program

    @property
    def digest(self) -> str:
        """SHA-256 over parameters and ids, in hex; the same on every platform."""
        return digest({**self.params, "ids": self.ids}, {"kind": KIND})

    def edited(self, params: Params, ids: Tensor) -> "VariationalPosterior":
        """A new posterior of other parameters and rows."""
        new = copy.copy(self)
        new.params, new.ids, new.parent, new._guide = clone(params), ids.clone(), self.digest, None
        return new

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within the context Pyro's parameter store holds these parameters, to be read or trained further."""
        guide = self._program.guide.guide
        with loaded_store({name: guide_part(self.params)[name] for name in guide.stored}, guide.constraints):
            yield

    def draws(self, num_draws: int, seed: int = 0) -> Latents:
        """Independent draws in the sites' supports, each of shape (num_draws, *site)."""
        if num_draws < 1:
            raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
        guide, params = self._program.guide, guide_part(self.params)
        like = next(iter(self.params.values()))
        with forked_rng(seed), torch.no_grad(), quiet():
            if guide.num_normals and guide.vectorised:
                noise = torch.randn(num_draws, guide.num_normals, dtype=like.dtype, device=like.device)
                return over_draws(lambda drawn: guide.run(params, drawn["noise"]).latents, {"noise": noise}, num_draws)
            # A point mass draws the same every time.
            runs = [guide.run(params, None).latents for _ in range(num_draws if guide.num_normals != 0 else 1)]
            runs *= num_draws // len(runs)
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

    def log_likelihood(self, data: Data, num_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of each datum under each draw, summed over sites; shape (1, num_draws, rows), nats."""
        latents = self.draws(num_draws, seed)
        program, learned = self._program.program, model_part(self.params)
        with torch.no_grad():
            return data.gather(lambda batch: latents_log_likelihood(program, latents, num_draws, batch, learned))[None]

    def predictive(self, num_samples: int) -> Predictive:
        """Pyro's `Predictive` of this posterior; observed values passed to it are ignored."""
        return Predictive(unconditioned(self.model), guide=self.guide, num_samples=num_samples)

    def save(self, path: str | Path) -> Path:
        """Write parameters and ids to one safetensors file, with a checksum; model and guide are code and stay out."""
        about, held = encode_program(self._program.program)
        header = {"kind": KIND, "parent": self.parent, "params": list(self.params), **about}
        tensors = {f"params/{name}": value for name, value in self.params.items()}
        # A flow's permutations and the like are no parameters, but the guide is not the same without them.
        held |= {f"{_FIXED}{name}": value for name, value in self._program.guide.guide.fixed.items()}
        return save_tensors(path, {**tensors, **held, "ids": self.ids}, header)

    @staticmethod
    def load(
        path: str | Path, model: Callable[..., Any], guide: Callable[..., Any], data: Data | None = None
    ) -> "VariationalPosterior":
        """Read a saved posterior; model and guide are the code it was fitted with.

        Args:
            path: what `save` wrote.
            model: the same model.
            guide: the same guide; one that has never run is initialised from the saved shapes of the call.
            data: its rows, to check model and guide against them again; the posterior goes to their device.

        Raises:
            ValueError: the file is damaged or of another kind, or model, guide or data do not fit it.
        """
        tensors, header = load_tensors(path)
        if header.get("kind") != KIND:
            raise ValueError(f"{path} holds a {header.get('kind')!r} posterior: load it with the class it came from.")
        tensors = beside(tensors, data)
        params = {name: tensors[f"params/{name}"] for name in header["params"]}
        program = decode_program(header, tensors, path, model, data, model_part(params))
        held = {name[len(_FIXED) :]: value for name, value in tensors.items() if name.startswith(_FIXED)}
        adopted = Guide.rebuilt(fresh_copy(guide), program.plate, program.template, guide_part(params) | held)
        posterior = object.__new__(VariationalPosterior)
        posterior._assemble(program, adopted, tensors["ids"])
        posterior.params, posterior.parent = params, header["parent"]
        if data is not None:
            refuse_other_ids(data, posterior.ids, path)
            check_rows(program, data, first_draw(adopted).latents)
        return posterior

    @property
    def _program(self) -> Any:
        return self.energy.whole


def _every_entry_matters(energy: VariationalEnergy, params: Params, batch: Batch) -> None:
    """An entry without influence on the energy cannot be edited: usually a sign that it was never substituted."""
    _, gradient = value_and_gradient(lambda leaves: energy.prior(leaves) + energy.share(leaves, batch), params)
    dead = [name for name, value in gradient.items() if not bool(value.any())]
    if dead:
        raise ValueError(
            f"The energy does not depend on the parameters {dead}: they are unused, or the program reads other "
            "tensors of the same names. Remove them, or `freeze` them if they are the model's."
        )
