"""Forgetting by weights alone: the draws stay where they are."""

from dataclasses import dataclass

from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import BLIND_SPOT, cloud_of
from pyro_forget.forgetters.health import health_warnings, input_health
from pyro_forget.importance import DRAWS_FOR_KHAT, khat_threshold, pareto_smooth
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.posterior import Posterior


@dataclass(frozen=True)
class Reweight:
    """Weight each draw by 1/p(erased | θ), Pareto-smoothed.

    Right for a few data of little influence. Draws must lie where the new posterior does; k̂ and the effective sample
    size say when they do not.

    References:
        Gelfand, Dey and Chang (1992), Model determination using predictive distributions; Vehtari, Simpson, Gelman,
        Yao and Gabry (2024), JMLR 25(72).
    """

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The same draws with new weights. With nothing erased it is the input itself.

        Raises:
            ValueError: the posterior is not one of draws.
        """
        cloud = cloud_of(posterior, "Reweight")
        num_draws = len(cloud.matrix)
        method = "importance weights"
        if len(erased) == 0:
            return Edit(posterior, Evidence(method=method, num_draws=num_draws))
        log_likelihood = cloud.log_likelihood(erased)
        num_bad = int((~log_likelihood.isfinite()).sum())
        if num_bad:
            refused = f"The erased data have no finite log density at {num_bad} of {num_draws} draws."
            return Edit(posterior, Evidence(method=method, num_draws=num_draws, refused=refused))
        # Minus: what is erased divides the posterior.
        weights = pareto_smooth(cloud.log_weights - log_likelihood)
        rhat, ess = input_health(cloud.posterior)
        threshold = khat_threshold(num_draws)
        said = [*health_warnings(rhat, ess)]
        if num_draws < DRAWS_FOR_KHAT:
            said.append(f"Pareto k̂ needs at least {DRAWS_FOR_KHAT} draws, got {num_draws}: sample longer.")
        elif weights.khat is None or weights.khat > threshold:
            shown = "unknown" if weights.khat is None else f"{weights.khat:.2f}"
            said.append(f"Pareto k̂ is {shown}, above {threshold:.2f}: too much was erased for weights alone.")
        evidence = Evidence(
            method=method,
            warnings=tuple(said),
            ess=weights.ess,
            khat=weights.khat,
            num_draws=num_draws,
            rhat_input=rhat,
            ess_input=ess,
            step_norm=dict.fromkeys(cloud.posterior.params, 0.0),
            extra={"limits": BLIND_SPOT},
        )
        return Edit(cloud.edited(cloud.matrix, retained.ids, weights.log_weights), evidence)
