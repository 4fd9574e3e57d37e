"""The affine map of a cloud that Newton's method finds, for requests that one influence step is too short for."""

from pyro_forget.forgetters.cloud import Request
from pyro_forget.forgetters.steps import mean_hessian
from pyro_forget.inference import Affine
from pyro_forget.inference.affine_newton import AffineNewton, AffineProblem

_DRAWS_A_DIMENSION, _FEWEST = 16, 64  # that a map is found with: more say little else


def swept_map(request: Request, among: slice = slice(None)) -> Affine:
    """The map that minimises the tilted KL divergence to the retained posterior of the draws that are `among` these."""
    cloud = request.cloud
    draws = cloud.representatives(max(_FEWEST, _DRAWS_A_DIMENSION * cloud.matrix.shape[1]), among)
    everything = request.erased.join(request.retained)
    problem = AffineProblem(
        draws=draws,
        log_target=lambda rows: cloud.log_joint_and_gradient(rows, request.retained),
        hessian=lambda rows: mean_hessian(cloud, rows, request.retained),
        tilt=-cloud.log_joint_and_gradient(draws, everything)[1].mean(0),
        hessian_before=mean_hessian(cloud, draws, everything),
    )
    return AffineNewton().run(problem)[0]
