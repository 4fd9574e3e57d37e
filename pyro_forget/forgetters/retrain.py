"""Forgetting by fitting again: what every other method is measured against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from pyro_forget.data import Data
from pyro_forget.effects.adoption import first_params
from pyro_forget.effects.program import Program
from pyro_forget.effects.random import forked_rng
from pyro_forget.energy.variational import MODEL_PREFIX
from pyro_forget.forgetters.health import input_health
from pyro_forget.forgetters.training import trained
from pyro_forget.inference.fit import Training
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

_START_RADIUS = 2.0  # of uniform starts in unconstrained space, Stan's
_TRIES = 100
_GOOD_RHAT, _GOOD_ESS = 1.01, 400  # Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), section 4


@dataclass(frozen=True)
class Retrain:
    """Fit again, from scratch, to the retained data.

    A guide is made anew and trained as `fit_guide` does; draws are sampled anew by Pyro's MCMC on the retained log
    joint in unconstrained space, chain after chain from starts of their own. Both go through the plate override, so a
    model with a hard-coded number of data is retrained to what is left.

    Attributes:
        num_steps: of Adam; 0 for the polish alone.
        learning_rate: of Adam, decaying to zero by a cosine.
        batch_size: rows a step; all of them by default.
        polish: "lbfgs" on pinned noise after Adam, or None.
        kernel: makes the kernel of a chain from `potential_fn=`, such as NUTS or `partial(NUTS, full_mass=True)`.
        num_chains: one after another.
        num_draws: of a chain, after the warm-up.
        num_warmup: steps of a chain that are not kept.
        seed: of initial values, batches, noise and chains.
        progress: show a bar.
    """

    num_steps: int = 2000
    learning_rate: float = 0.01
    batch_size: int | None = None
    polish: str | None = "lbfgs"
    kernel: Callable[..., Any] = NUTS
    num_chains: int = 2
    num_draws: int = 500
    num_warmup: int = 500
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("num_chains", 1), ("num_draws", 1), ("num_warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        self._training()

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior fitted again; refused where it cannot be started anew. Nothing erased: the input itself."""
        if not erased.num_data:
            return Edit(posterior, Evidence("retraining: nothing to erase, the posterior is returned as it is"))
        if isinstance(posterior, SampledPosterior):
            return self._sampled(posterior, retained)
        if not isinstance(posterior, VariationalPosterior):
            refused = "an energy written by hand does not say where a fit starts; fit it, or go on by `Finetune`"
            return Edit(posterior, Evidence("retraining", refused=refused))
        try:
            start = first_params(posterior.energy.whole.guide, retained, self.seed)
        except ValueError as error:
            return Edit(posterior, Evidence("retraining", refused=str(error)))
        learned, kept = _first_model_params(posterior)
        return trained(posterior, start | learned, retained, self._training(), "retraining from scratch", kept)

    def _training(self) -> Training:
        return Training(
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            polish=self.polish,
            seed=self.seed,
            progress=self.progress,
        )

    def _sampled(self, posterior: SampledPosterior, retained: Data) -> Edit:
        target = _Target(posterior, retained)
        chains = [self._chain(target, number) for number in range(self.num_chains)]
        params = {name: torch.stack([draws[name] for draws, _ in chains]) for name in posterior.params}
        like = posterior.params
        new = posterior.edited({name: value.to(like[name]) for name, value in params.items()}, retained.ids)
        rhat, ess = input_health(new)
        divergences = sum(number for _, number in chains)
        evidence = Evidence(
            method=(
                f"retraining by {_name(self.kernel)}: {self.num_chains} chains of {self.num_draws} draws after "
                f"{self.num_warmup} of warm-up, each from a start of its own"
            ),
            warnings=_warnings(rhat, ess, divergences),
            num_draws=self.num_chains * self.num_draws,
            extra={"rhat": rhat, "ess": ess, "divergences": divergences},
        )
        return Edit(new, evidence)

    def _chain(self, target: "_Target", number: int) -> tuple[Params, int]:
        """(draws in unconstrained space, divergences) of one chain.

        One at a time: Pyro runs chains side by side in processes of their own, which need a model that can be
        pickled, and warns where there are fewer cores than chains.
        """
        with forked_rng(self.seed * 1_000_003 + number):
            mcmc = MCMC(
                self.kernel(potential_fn=target.potential),
                num_samples=self.num_draws,
                warmup_steps=self.num_warmup,
                initial_params=target.start(),
                disable_progbar=not self.progress,
            )
            mcmc.run()
        return mcmc.get_samples(), _divergences(mcmc)


@dataclass(frozen=True)
class _Target:
    """−log joint of the retained data in unconstrained space, as Pyro's kernels want it."""

    posterior: SampledPosterior
    retained: Data

    @property
    def device(self) -> torch.device:
        return next(iter(self.posterior.params.values())).device

    def potential(self, values: Params) -> Tensor:
        """Scalar, nats; float64 outside, for differences of large sums, the model's own type inside."""
        params = self.posterior.params
        cloud = {name: value.to(params[name].dtype)[None, None] for name, value in values.items()}
        return -self.posterior.log_joint(cloud, self.retained)[0, 0]

    def start(self) -> Params:
        """Uniform on (−2, 2) by coordinate, the first that has a finite energy.

        Raises:
            ValueError: none of 100 has.
        """
        like = {name: value[0, 0].double() for name, value in self.posterior.params.items()}
        for _ in range(_TRIES):
            values = {name: torch.empty_like(v).uniform_(-_START_RADIUS, _START_RADIUS) for name, v in like.items()}
            with torch.no_grad():
                if bool(self.potential(values).isfinite()):
                    return values
        raise ValueError(
            f"None of {_TRIES} starts between −2 and 2 in unconstrained space has a finite log joint: check the data "
            "and the priors."
        )


def _first_model_params(posterior: VariationalPosterior) -> tuple[Params, tuple[str, ...]]:
    """(learned parameters of the model as they are first made, what to say where they cannot be)."""
    program = posterior.energy.whole.program
    names = program.model.free
    if not names:
        return {}, ()
    made = Program.rebuilt(
        program.model.program, program.plate, program.indexed, program.template, program.minibatch_of, names
    ).model
    fitted = [name for name in names if isinstance(made.program, nn.Module) and name not in made.stored]
    start = {
        MODEL_PREFIX + name: posterior.params[MODEL_PREFIX + name] if name in fitted else made.params[name]
        for name in names
    }
    if not fitted:
        return start, ()
    return start, (
        f"The model's own parameters {fitted} were made with it: they start from their fitted values, which all the "
        "data shaped.",
    )


def _divergences(mcmc: MCMC) -> int:
    """Of one chain; 0 for kernels that do not count them."""
    return sum(len(found) for found in mcmc.diagnostics().get("divergences", {}).values())


def _name(kernel: Any) -> str:
    inner = getattr(kernel, "func", kernel)
    return getattr(inner, "__name__", type(inner).__name__)


def _warnings(rhat: float | None, ess: float | None, divergences: int) -> tuple[str, ...]:
    said = []
    shown = [f"R-hat {rhat:.3f}"] if rhat is not None and rhat >= _GOOD_RHAT else []
    shown += [f"an effective sample size of {ess:.0f}"] if ess is not None and ess < _GOOD_ESS else []
    if shown:
        said.append(f"The new draws have {' and '.join(shown)}: sample longer before relying on them.")
    if divergences:
        said.append(f"{divergences} of the new draws ended a divergent trajectory: the sampler missed a region there.")
    return tuple(said)
