"""The method for those who do not choose one: the only place where forgetters meet."""

from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.transport import Transport
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import Posterior, SampledPosterior


def default_forgetter(posterior: Posterior) -> Forgetter:
    """`Transport` for draws, `Influence` for everything else."""
    return Transport() if isinstance(posterior, SampledPosterior) else Influence()
