"""The method for those who do not choose one: the only place where forgetters meet."""

from dataclasses import dataclass, replace

from pyro_forget.data import Data
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.network import is_network
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.forgetters.transport import Transport
from pyro_forget.outcome import Edit, Forgetter
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior


def default_forgetter(posterior: Posterior) -> Forgetter:
    """The method for a posterior.

    `PairedDescent` for networks: a thousand latents or more, and a likelihood at an output that is not affine in them.
    Of everything else, `Transport` for draws, and `Influence`; where that is refused for a guide, `PairedDescent`.
    """
    if is_network(posterior):
        return PairedDescent()
    if isinstance(posterior, SampledPosterior):
        return Transport()
    return Otherwise(Influence(), PairedDescent()) if isinstance(posterior, VariationalPosterior) else Influence()


@dataclass(frozen=True)
class Otherwise:
    """One method, and another where the first refuses; what is returned has passed the acceptance of either.

    Attributes:
        first: tried first.
        second: tried where `first` refuses.
    """

    first: Forgetter
    second: Forgetter

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The first edit that is not refused; else the first refusal."""
        tried = self.first.edit(posterior, erased, retained)
        if tried.evidence.refused is None:
            return tried
        try:
            found = self.second.edit(posterior, erased, retained)
        except ValueError as error:  # it cannot read this model at all, which the first could
            return _refused(tried, str(error))
        if found.evidence.refused is not None:
            return _refused(tried, found.evidence.refused)
        warning = f"{tried.evidence.method} was refused ({tried.evidence.refused}); the method below took its place."
        extra = {**found.evidence.extra, "refused_before": tried.evidence.refused}
        return Edit(
            found.posterior,
            replace(found.evidence, warnings=(warning, *found.evidence.warnings), extra=extra),
        )


def _refused(tried: Edit, why: str) -> Edit:
    """The first refusal, with what the second method said."""
    extra = {**tried.evidence.extra, "refused_after": why}
    return Edit(tried.posterior, replace(tried.evidence, extra=extra))
