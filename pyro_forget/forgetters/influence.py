"""Forgetting by influence: the tilted retained energy of a variational posterior, minimised from where it stands."""

from dataclasses import dataclass, replace

from pyro_forget.data import Data
from pyro_forget.energy import CoordinateEnergy, Energy, VariationalEnergy, coordinates_of, gaussian_of
from pyro_forget.energy.variational import guide_part, model_part
from pyro_forget.gaussian import GaussianGuide
from pyro_forget.inference.newton import NewtonSteps
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.sweeps import Descent, Sweeps, loc_force, stationarity
from pyro_forget.inference.sweeps import Sweep as KeptSweep
from pyro_forget.outcome import Edit, Evidence, Sweep, gathered
from pyro_forget.params import Params, all_finite, norm, subtract
from pyro_forget.posterior import Posterior
from pyro_forget.tilt import TiltedEnergy

Pair = tuple[TiltedEnergy, TiltedEnergy]


@dataclass(frozen=True)
class Influence:
    """Sweeps of location and scale on the tilted retained energy, each step accepted under held-out noise.

    For Gaussian guides the location moves by Gauss-Newton steps in the guide's own metric and the scale by the ratio
    of precisions at the new location; other guides, learned model parameters and hand-written energies move by the
    Hessian with the same damping and acceptance. Linear-Gaussian models are exact in one sweep.

    Attributes:
        max_sweeps: one is the influence function with its scale; more refine it.
        num_products: curvature products a sweep.
        num_pairs: antithetic pairs of the steps' noise; None for enough to have exact moments.
        num_held_out: pairs of the held-out noise; None for as many.
        chunk: erase this many rows at a time; None for all at once.
        curvature: "gauss_newton" where the guide allows, or "hessian" of the guide's own parameters.
        seed: of both noises.
        recursion: the published algorithm in place of all this; see `published`.

    References:
        S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 4, for the step
        H⁻¹∇h that the first sweep refines.
    """

    max_sweeps: int = 8
    num_products: int = 20
    num_pairs: int | None = None
    num_held_out: int | None = None
    chunk: int | None = None
    curvature: str = "gauss_newton"
    seed: int = 0
    recursion: Recursion | None = None

    def __post_init__(self) -> None:
        if self.curvature not in ("gauss_newton", "hessian"):
            raise ValueError(f"`curvature` must be 'gauss_newton' or 'hessian', got {self.curvature!r}.")
        for name in ("max_sweeps", "num_products", "num_pairs", "num_held_out", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    @staticmethod
    def published(
        scaling: float = 0.1,
        num_steps: int = 64,
        batch_size: int = 128,
        num_draws: int = 5,
        chunk: int = 64,
        seed: int = 0,
    ) -> "Influence":
        """The published algorithm: Neumann recursion on fresh batches and draws, nothing checked."""
        return Influence(recursion=Recursion(scaling, num_steps, batch_size, num_draws, chunk, seed))

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior without `erased`; refused where no step keeps a quarter of what it promises."""
        if not erased.num_data:
            return Edit(posterior, Evidence("Influence: nothing to erase, the posterior is returned as it is"))
        if self.recursion is not None:
            return _published(self.recursion, posterior, erased, retained)
        edits, current = [], posterior
        for chunk, rest in _chunks(erased, retained, self.chunk):
            edits.append(self._edit(current, chunk, rest))
            current = edits[-1].posterior
            if edits[-1].evidence.refused:
                # What was kept of earlier chunks is not what was asked for.
                return Edit(posterior, edits[-1].evidence)
        evidence = gathered([edit.evidence for edit in edits])
        return _edited(posterior, current.params, retained, evidence)

    def _edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        sought = _coordinates(posterior, self.curvature)
        pair = self._pair(sought, erased, retained)
        descent = sought.rule(self.max_sweeps, self.num_products).run(pair)
        evidence = _evidence(self, sought, pair, descent)
        if evidence.refused or not all_finite(descent.params):
            reason = evidence.refused or "the result is not finite"
            return Edit(posterior, replace(evidence, refused=reason))
        return _edited(posterior, sought.back(descent.params), retained, evidence)

    def _pair(self, sought: "_Sought", erased: Data, retained: Data) -> Pair:
        """The tilted energy under the steps' and under the held-out noise; one and the same where nothing is drawn."""
        energies = [sought.energy.with_noise(2 * self.seed + 1, self.num_pairs)]
        if not sought.deterministic:
            energies.append(sought.energy.with_noise(2 * self.seed + 2, self.num_held_out or self.num_pairs))
        tilted = [TiltedEnergy.of(energy, sought.params, erased, retained) for energy in energies]
        return tilted[0], tilted[-1]


@dataclass(frozen=True)
class _Sought:
    """The coordinates in which the energy is minimised."""

    energy: Energy
    params: Params
    view: GaussianGuide | None
    own: Params

    @property
    def is_gaussian(self) -> bool:
        """Whether they are a Gaussian's."""
        return self.view is not None

    @property
    def deterministic(self) -> bool:
        """Whether other noise gives the same energy."""
        if isinstance(self.energy, CoordinateEnergy):
            gaussian = self.energy.gaussian
            closed = len(gaussian.conjugate) == len(gaussian.view.transforms)
            return gaussian.quadrature is not None and closed
        if isinstance(self.energy, VariationalEnergy):
            return self.energy.whole.guide.num_normals == 0
        return self.energy.with_noise(1) is self.energy

    def rule(self, max_sweeps: int, num_products: int) -> Sweeps | NewtonSteps:
        """How to descend in them."""
        return (Sweeps if self.is_gaussian else NewtonSteps)(max_sweeps, num_products)

    def back(self, params: Params) -> Params:
        """The posterior's own params."""
        if self.view is None:
            return params
        return self.own | self.view.write(guide_part(self.own), gaussian_of(params))


def _coordinates(posterior: Posterior, curvature: str) -> _Sought:
    """A Gaussian's own where there is one and nothing else is learned; the posterior's params otherwise."""
    energy = posterior.energy
    if curvature == "gauss_newton" and isinstance(energy, VariationalEnergy) and energy.gaussian is not None:
        if not model_part(posterior.params) and energy.gaussian.has_fisher:
            view = energy.gaussian.view
            own = coordinates_of(view.read(guide_part(posterior.params)).detach())
            return _Sought(CoordinateEnergy(energy.gaussian), own, view, posterior.params)
    return _Sought(energy, posterior.params, None, posterior.params)


def _chunks(erased: Data, retained: Data, size: int | None) -> list[tuple[Data, Data]]:
    """(chunk, everything that is left without it), in order."""
    if size is None or size >= erased.num_data:
        return [(erased, retained)]
    whole, found = erased.join(retained), []
    for ids in erased.ids.split(size):
        chunk, whole = whole.split(ids)
        found.append((chunk, whole))
    return found


def _evidence(settings: Influence, sought: _Sought, pair: Pair, descent: Descent) -> Evidence:
    sweeps = tuple(_row(sweep) for sweep in descent.sweeps)
    kind = "Gauss-Newton sweeps of location and scale" if sought.is_gaussian else "Newton steps on the Hessian"
    nu = stationarity(pair, descent)
    refused = None
    if not sweeps and descent.ended != "converged":
        refused = (
            "no damping gave a step that keeps a quarter of its promise under held-out noise: the request is beyond "
            "what a local correction can do here; refit, or erase in chunks"
        )
    untilted = pair[1].at_origin - pair[1].untilted(descent.values[1], descent.params) if sweeps else 0.0
    return Evidence(
        method=f"Influence ({kind}, at most {settings.max_sweeps})",
        refused=refused,
        warnings=_warnings(nu, untilted, pair, sought, descent),
        solver=descent.ended,
        num_products=sum(sweep.num_products for sweep in descent.sweeps),
        residual=next((s.location.residual for s in reversed(descent.sweeps) if s.location), None),
        damping=sweeps[-1].damping if sweeps else None,
        sweeps=sweeps,
        predicted_fall=sum(row.predicted + row.scale_predicted for row in sweeps),
        realised_fall=sum(row.realised + row.scale_realised + row.ahead_realised for row in sweeps),
        held_out_fall=sum(row.held_out + row.scale_held_out + row.ahead_held_out for row in sweeps),
        untilted_fall=untilted,
        stationarity=nu,
    )


def _row(sweep: KeptSweep) -> Sweep:
    location, scale, ahead = sweep.location, sweep.scale, sweep.ahead
    return Sweep(
        damping=location.damping if location else 0.0,
        predicted=location.predicted if location else 0.0,
        realised=location.realised if location else 0.0,
        held_out=location.held_out if location else 0.0,
        scale_predicted=scale.predicted if scale else 0.0,
        scale_realised=scale.realised if scale else 0.0,
        scale_held_out=scale.held_out if scale else 0.0,
        num_products=sweep.num_products,
        ahead_realised=ahead.realised if ahead else 0.0,
        ahead_held_out=ahead.held_out if ahead else 0.0,
    )


def _warnings(nu: float | None, untilted: float, pair: Pair, sought: _Sought, descent: Descent) -> tuple[str, ...]:
    found = []
    if nu is not None and nu > 1:
        found.append(
            f"The fit was far from stationary (ν = {nu:.2g}, more than the request itself): its own error is carried "
            "over as it is. Fit longer before relying on the result."
        )
    elif nu is not None and nu > 0.3:
        found.append(f"The fit was not quite stationary (ν = {nu:.2g}): part of the distance to a refit is its own.")
    if untilted < 0:
        found.append(
            f"The retained data's own energy rose by {-untilted:.3g} nats under held-out noise: the correction "
            "follows the fit's remaining gradient."
        )
    if descent.ended == "diverging":
        found.append("The sweeps began to grow and were stopped; the last good one was kept.")
    if sought.is_gaussian and (figure := loc_force(pair)) is not None and figure[0] > 1 and figure[0] > 3 * figure[1]:
        found.append(
            f"The guide was not near stationary: its location's gradient is {figure[0]:.2g} standard deviations "
            f"(error {figure[1]:.2g}) where 1 or less is usual. Fit longer."
        )
    return tuple(found)


def _published(recursion: Recursion, posterior: Posterior, erased: Data, retained: Data) -> Edit:
    params = recursion.run(posterior.energy, posterior.params, erased, erased.join(retained))
    method = f"Influence, published recursion (T = {recursion.num_steps}, scaling {recursion.scaling:g})"
    chunks = -(-erased.num_data // recursion.chunk)
    evidence = Evidence(method, solver="not checked", num_products=chunks * recursion.num_steps)
    if not all_finite(params):
        return Edit(posterior, replace(evidence, refused="the recursion diverged; lower `scaling`"))
    return _edited(posterior, params, retained, evidence)


def _edited(posterior: Posterior, params: Params, retained: Data, evidence: Evidence) -> Edit:
    """The edit of the posterior as it came: of a request in chunks, it is the parent, not the last chunk's."""
    steps = {name: norm({name: value}) for name, value in subtract(params, posterior.params).items()}
    return Edit(posterior.edited(params, retained.ids), replace(evidence, step_norm=steps))
