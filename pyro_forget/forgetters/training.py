"""What fine-tuning and retraining of parameters share: training on the retained data, and what to say of it."""

import math
from dataclasses import replace

import torch

from pyro_forget.data import Data
from pyro_forget.energy import Energy
from pyro_forget.inference.fit import Trained, Training
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params, norm, subtract
from pyro_forget.posterior import Posterior


def trained(
    posterior: Posterior,
    start: Params,
    retained: Data,
    training: Training,
    verb: str,
    warnings: tuple[str, ...] = (),
) -> Edit:
    """The posterior of params trained from `start` on the retained data; refused where the energy diverges."""
    evidence = Evidence(method=f"{verb}: {_words(training)}", warnings=warnings)
    try:
        found = training.run(posterior.energy, start, retained)
        fall = _fall(posterior.energy, posterior.params, found.params, retained, training.seed)
    except ValueError as error:
        return Edit(posterior, replace(evidence, refused=f"the training diverged ({error})"))
    steps = subtract(found.params, posterior.params)
    evidence = replace(
        evidence,
        warnings=(*warnings, *_warnings(found, fall, training)),
        solver=_result(found, training),
        untilted_fall=fall,
        step_norm={name: norm({name: value}) for name, value in steps.items()},
        extra={"gradient_norm": found.gradient_norm, "num_evaluations": len(found.losses)},
    )
    return Edit(posterior.edited(found.params, retained.ids), evidence)


def _words(training: Training) -> str:
    adam = f"{training.num_steps} steps of Adam at {training.learning_rate:g}" if training.num_steps else ""
    polish = "L-BFGS on pinned noise" if training.polish else ""
    return ", then ".join(filter(None, (adam, polish))) or "no steps"


def _result(found: Trained, training: Training) -> str | None:
    if found.gradient_norm is None:
        return None
    return "converged" if found.gradient_norm <= training.polish_gradient else "not converged"


def _fall(energy: Energy, before: Params, after: Params, data: Data, seed: int) -> float:
    """F(before) − F(after) on the data under noise that the training did not see, nats."""
    held_out = energy.with_noise(2 * seed + 2)
    with torch.no_grad():
        fall = float(held_out.total(before, data)) - float(held_out.total(after, data))
    if not math.isfinite(fall):
        raise ValueError(f"the energy fell by {fall}")
    return fall


def _warnings(found: Trained, fall: float, training: Training) -> tuple[str, ...]:
    said = []
    if _result(found, training) == "not converged":
        said.append(
            f"L-BFGS ended with a gradient of norm {found.gradient_norm:.1e} where {training.polish_gradient:.0e} was "
            "wanted."
        )
    if fall < 0:
        said.append(
            f"The retained data's own energy is {-fall:.3g} nats higher than before, under noise that the training did "
            "not see: take more steps, or smaller ones."
        )
    return tuple(said)
