import math
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_forget.curvature import Congruence, FunctionOperator, MatrixOperator, Scaled, Shifted, as_matrix
from pyro_forget.params import all_finite, dot, flatten, map_params, norm, scale, size, subtract, unflatten, zeros_like
from pyro_forget.solvers import Cholesky, ConjugateGradient, Lanczos, Neumann, Result, Solution, SolverError

SHAPES = {"weight": (2, 3), "bias": (), "loc": (5,)}
SIZE = 12


def like(dtype=torch.float64):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_params(seed, dtype=torch.float64):
    return map_params(lambda value: value.to(dtype), unflatten(normal(SIZE, seed=seed), like()))


def with_eigenvalues(eigenvalues, seed=0, dtype=torch.float64):
    rotation = torch.linalg.qr(normal(SIZE, SIZE, seed=seed)).Q
    matrix = rotation * torch.as_tensor(eigenvalues, dtype=torch.float64) @ rotation.T
    return MatrixOperator((0.5 * (matrix + matrix.T)).to(dtype), like(dtype))


def diagonal(values, dtype=torch.float64):
    return MatrixOperator(torch.diag(torch.as_tensor(values, dtype=dtype)), like(dtype))


def spread(condition):
    return torch.logspace(0, math.log10(condition), SIZE, dtype=torch.float64)


def error(solution, truth):
    return norm(subtract(solution.value, truth)) / norm(truth)


# Operator and its condition number: a solver's error is its residual times that.
OPERATORS = {
    "identity": (diagonal([1.0] * SIZE), 1),
    "diagonal": (diagonal(torch.linspace(0.5, 4, SIZE)), 8),
    "dense": (with_eigenvalues(spread(10)), 10),
    "repeated eigenvalues": (with_eigenvalues([1.0] * 5 + [3.0] * 7), 3),
    "ill-conditioned": (with_eigenvalues(spread(1e4)), 1e4),
    "tiny": (Scaled(with_eigenvalues(spread(10)), 1e-9), 10),
    "damped": (Shifted(with_eigenvalues(torch.linspace(-1, 4, SIZE)), 2.0), 6),
    "metric": (Shifted(with_eigenvalues(spread(10)), 0.3, map_params(lambda v: 1 + v.abs(), random_params(8))), 10),
    "congruence": (Congruence(with_eigenvalues(spread(10)), map_params(torch.exp, random_params(9))), 1e4),
}
SOLVERS = {
    "conjugate gradient": ConjugateGradient(rtol=1e-10),
    "preconditioned": ConjugateGradient(rtol=1e-10, preconditioner=map_params(torch.exp, random_params(3))),
    "preconditioned by function": ConjugateGradient(rtol=1e-10, preconditioner=with_eigenvalues(spread(3), seed=4).mv),
    "lanczos": Lanczos(num_steps=SIZE, rtol=1e-8),
    "cholesky": Cholesky(rtol=1e-8),
    "neumann": Neumann(num_steps=2000, rtol=1e-10),
}
operators = pytest.mark.parametrize(("operator", "condition"), OPERATORS.values(), ids=OPERATORS.keys())
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class TestLaws:
    @solvers
    @operators
    def test_solve_inverts_mv(self, solver, operator, condition):
        if isinstance(solver, Neumann) and condition > 100:
            pytest.skip("a Neumann series takes about as many steps as the condition number, many times")
        truth = random_params(1)
        solution = solver.solve(operator, operator.mv(truth))
        assert solution.result is Result.CONVERGED
        assert solution.require() is solution
        assert error(solution, truth) < 1e-8 * condition

    @solvers
    @pytest.mark.parametrize("condition", [1, 10])
    def test_single_precision_stays_single(self, solver, condition):
        operator = with_eigenvalues(spread(condition), dtype=torch.float32)
        truth = random_params(1, torch.float32)
        solution = solver.solve(operator, operator.mv(truth))
        assert all(value.dtype == torch.float32 for value in solution.value.values())
        assert error(solution, truth) < 1e-5

    @solvers
    @operators
    def test_residual_is_the_true_one(self, solver, operator, condition):
        rhs = random_params(2)
        solution = solver.solve(operator, rhs)
        true = norm(subtract(operator.mv(solution.value), rhs)) / norm(rhs)
        if isinstance(solver, Neumann):
            assert true <= solution.residual * (1 + 1e-4)
        else:
            assert solution.residual == pytest.approx(true, abs=1e-12 * condition)

    @solvers
    def test_zero_stays_zero(self, solver):
        solution = solver.solve(OPERATORS["dense"][0], like())
        assert solution == Solution(solution.value, Result.CONVERGED, 0, 0.0)
        assert norm(solution.value) == 0
        assert {name: value.shape for name, value in solution.value.items()} == {n: v.shape for n, v in like().items()}

    @solvers
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
    def test_solutions_scale_with_the_right_hand_side(self, solver, seed, exponent):
        operator, rhs = OPERATORS["dense"][0], random_params(seed)
        once, scaled = (solver.solve(operator, side) for side in (rhs, scale(rhs, -(2.0**exponent))))
        assert (once.result, once.num_steps) == (scaled.result, scaled.num_steps)
        torch.testing.assert_close(scaled.value, scale(once.value, -(2.0**exponent)), rtol=1e-9, atol=0)

    @solvers
    def test_arguments_are_left_alone(self, solver):
        operator, rhs = with_eigenvalues(spread(10)), random_params(2)
        matrix, before, state = operator.matrix.clone(), flatten(rhs).clone(), torch.get_rng_state()
        solver.solve(operator, rhs)
        assert torch.equal(operator.matrix, matrix)
        assert torch.equal(flatten(rhs), before)
        assert torch.equal(torch.get_rng_state(), state)

    @solvers
    def test_gradients_do_not_leak(self, solver):
        operator = OPERATORS["dense"][0]
        rhs = map_params(lambda value: value.requires_grad_(), random_params(2))
        assert not any(value.requires_grad for value in solver.solve(operator, rhs).value.values())


class TestFailures:
    @solvers
    def test_nan_from_the_operator(self, solver):
        solution = solver.solve(Scaled(OPERATORS["dense"][0], float("nan")), random_params(2))
        assert solution.result is Result.NON_FINITE
        assert norm(solution.value) == 0

    @solvers
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_in_the_right_hand_side(self, solver, bad):
        rhs = random_params(2) | {"bias": torch.tensor(bad, dtype=torch.float64)}
        solution = solver.solve(OPERATORS["dense"][0], rhs)
        assert solution.result is Result.NON_FINITE
        assert norm(solution.value) == 0

    @solvers
    def test_negative_definite(self, solver):
        solution = solver.solve(Scaled(OPERATORS["dense"][0], -1.0), random_params(2))
        assert solution.result is Result.NEGATIVE_CURVATURE
        assert norm(solution.value) == 0

    @pytest.mark.parametrize("name", ["conjugate gradient", "preconditioned", "lanczos", "cholesky"])
    def test_one_negative_direction(self, name):
        operator = with_eigenvalues([-0.5, *torch.linspace(1, 4, SIZE - 1)])
        assert SOLVERS[name].solve(operator, random_params(2)).result is Result.NEGATIVE_CURVATURE

    @solvers
    def test_zero_operator_is_singular(self, solver):
        solution = solver.solve(Scaled(OPERATORS["dense"][0], 0.0), random_params(2))
        assert solution.result is Result.SINGULAR
        assert norm(solution.value) == 0

    @pytest.mark.parametrize("name", ["conjugate gradient", "lanczos", "cholesky"])
    def test_a_force_that_no_step_answers_is_singular(self, name):
        operator = with_eigenvalues([0.0, *torch.linspace(1, 4, SIZE - 1)])
        assert SOLVERS[name].solve(operator, random_params(2)).result is Result.SINGULAR

    def test_require_raises_once_with_the_solution_attached(self):
        solution = SOLVERS["lanczos"].solve(Scaled(OPERATORS["dense"][0], -1.0), random_params(2))
        with pytest.raises(SolverError, match=r"Raise the damping.*negative_curvature") as caught:
            solution.require()
        assert caught.value.solution is solution
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("result", list(Result))
    def test_every_result_says_what_to_do(self, result):
        assert str(result) == result.value
        assert result.message.endswith(".")
        assert len(result.message) > 30


class TestConjugateGradient:
    def test_many_are_as_many_singles(self):
        """Each stops on its own: the sides differ in result and in steps."""
        operator = with_eigenvalues([-0.5, *torch.linspace(1, 4, SIZE - 1)])
        eigenvectors = torch.linalg.eigh(operator.matrix).eigenvectors.T
        sides = torch.stack(
            [
                eigenvectors[5],
                eigenvectors[0],
                eigenvectors[0] + 9 * eigenvectors[3],
                torch.zeros(SIZE).double(),
                eigenvectors[2:4].sum(dim=0),
                torch.full((SIZE,), float("nan")).double(),
            ]
        )
        solver = ConjugateGradient(rtol=1e-9, max_steps=6)
        rows = [unflatten(side, like()) for side in sides]
        many = solver.solve_many(operator, map_params(lambda *values: torch.stack(values), *rows))
        single = [solver.solve(operator, row) for row in rows]
        assert [solution.result for solution in many] == [solution.result for solution in single]
        assert [solution.num_steps for solution in many] == [solution.num_steps for solution in single]
        assert len({solution.result for solution in many}) == 3
        assert len({solution.num_steps for solution in many}) >= 3
        for one, other in zip(many, single, strict=True):
            torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-12)

    def test_many_take_one_block_product_a_step(self):
        class Counting:
            def __init__(self, operator):
                self.operator, self.rows = operator, []

            def mv(self, vector):
                raise AssertionError("a block operator is asked for blocks")

            def matmat(self, block):
                self.rows.append(len(block["bias"]))
                return self.operator.matmat(block)

        operator = Counting(with_eigenvalues([1.0] * 5 + [3.0] * 7))
        block = map_params(lambda *rows: torch.stack(rows), *(random_params(seed) for seed in range(4)))
        assert all(s.result is Result.CONVERGED for s in ConjugateGradient().solve_many(operator, block))
        assert operator.rows == [4, 4, 4]  # two steps for two eigenvalues, one product for the residual

    def test_two_eigenvalues_take_two_steps(self):
        solution = ConjugateGradient().solve(OPERATORS["repeated eigenvalues"][0], random_params(2))
        assert solution.num_steps == 2

    def test_the_exact_inverse_as_preconditioner_takes_one_step(self):
        eigenvalues = torch.linspace(0.5, 40, SIZE)
        inverse = unflatten(1 / eigenvalues.double(), like())
        for preconditioner in (inverse, lambda vector: map_params(torch.mul, vector, inverse)):
            solution = ConjugateGradient(preconditioner=preconditioner).solve(diagonal(eigenvalues), random_params(2))
            assert (solution.num_steps, solution.result) == (1, Result.CONVERGED)

    def test_truncation_minimises_over_the_krylov_space(self):
        operator, rhs = OPERATORS["dense"][0], random_params(2)
        truncated = ConjugateGradient(rtol=1e-12, max_steps=4).solve(operator, rhs)
        assert (truncated.result, truncated.num_steps) == (Result.MAX_STEPS, 4)
        torch.testing.assert_close(truncated.value, Lanczos(4).solve(operator, rhs).value)

    def test_negative_curvature_returns_the_iterate_so_far(self):
        operator = diagonal([-1.0, *([2.0] * (SIZE - 1))])
        rhs = unflatten(torch.tensor([0.1, *([1.0] * (SIZE - 1))], dtype=torch.float64), like())
        solution = ConjugateGradient().solve(operator, rhs)
        assert (solution.result, solution.num_steps) == (Result.NEGATIVE_CURVATURE, 1)
        assert norm(solution.value) > 0
        assert dot(rhs, solution.value) > 0

    def test_negative_curvature_at_the_first_step_returns_zero(self):
        rhs = unflatten(torch.eye(SIZE).double()[0], like())
        solution = ConjugateGradient().solve(diagonal([-1e-3, *([2.0] * (SIZE - 1))]), rhs)
        assert (solution.result, solution.num_steps, solution.residual) == (Result.NEGATIVE_CURVATURE, 0, 1.0)
        assert norm(solution.value) == 0

    def test_a_consistent_singular_system_is_solved(self):
        operator = with_eigenvalues([0.0, *torch.linspace(1, 4, SIZE - 1)])
        rhs = operator.mv(random_params(2))
        solution = ConjugateGradient(rtol=1e-9).solve(operator, rhs)
        assert solution.result is Result.CONVERGED
        torch.testing.assert_close(operator.mv(solution.value), rhs)

    def test_products_without_digits_stagnate(self):
        operator = with_eigenvalues(spread(1e3), dtype=torch.float32)
        solution = ConjugateGradient(rtol=1e-13).solve(operator, random_params(2, torch.float32))
        assert solution.result is Result.STAGNATED
        assert 1e-13 < solution.residual < 1e-2

    @pytest.mark.parametrize("max_steps", [1, 5, 40, 50, 55])
    def test_starting_again_spends_the_same_steps(self, max_steps):
        operator = with_eigenvalues(spread(1e3), dtype=torch.float32)
        solution = ConjugateGradient(rtol=1e-9, max_steps=max_steps).solve(operator, random_params(2, torch.float32))
        assert solution.num_steps == max_steps
        assert solution.result is Result.MAX_STEPS

    def test_curvature_below_the_precision_is_singular(self):
        operator = diagonal([1e-18, *([1.0] * (SIZE - 1))])
        solution = ConjugateGradient().solve(operator, random_params(2))
        assert solution.result is Result.SINGULAR
        assert norm(solution.value) < 100

    @pytest.mark.parametrize("name", ["identity", "dense", "repeated eigenvalues"])
    def test_no_tolerance_at_all_ends(self, name):
        solution = ConjugateGradient(rtol=0.0).solve(OPERATORS[name][0], random_params(2))
        assert solution.result in (Result.STAGNATED, Result.MAX_STEPS, Result.CONVERGED)
        assert solution.residual < 1e-14
        assert solution.num_steps < 60  # digits that float64 does not have are not chased

    def test_true_residual_decides(self):
        """An operator that answers differently from some product on cannot fake convergence."""
        operator, calls = OPERATORS["dense"][0], count()
        wrong = FunctionOperator(lambda vector: scale(operator.mv(vector), 1.0 if next(calls) % 2 else 1.5))
        solution = ConjugateGradient(rtol=1e-8).solve(wrong, random_params(2))
        assert solution.result is not Result.CONVERGED

    @pytest.mark.parametrize(
        "preconditioner",
        [
            random_params(3),
            lambda vector: scale(vector, -1.0),
            zeros_like,
            # Positive along the right-hand side, negative along a later residual.
            diagonal([-0.5, *([1.0] * (SIZE - 1))]).mv,
        ],
    )
    def test_preconditioner_must_be_positive(self, preconditioner):
        with pytest.raises(ValueError, match="`preconditioner`"):
            solver = ConjugateGradient(preconditioner=preconditioner)
            solver.solve(OPERATORS["dense"][0], random_params(2))

    @pytest.mark.parametrize("settings", [{"rtol": -1.0}, {"rtol": float("nan")}, {"max_steps": 0}])
    def test_settings_are_checked(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ConjugateGradient(**settings)


class TestLanczos:
    @pytest.mark.parametrize("eigenvalues", [spread(10), torch.linspace(-1.5, 4, SIZE)], ids=["definite", "not"])
    @settings(max_examples=20, deadline=None)
    @given(damping=st.floats(1.6, 1e4), seed=st.integers(0, 2**31))
    def test_one_space_solves_for_every_damping(self, eigenvalues, damping, seed):
        operator, rhs = with_eigenvalues(eigenvalues), random_params(seed)
        solution = Lanczos(SIZE).expand(operator, rhs).solve(damping)
        dense = torch.linalg.solve(as_matrix(Shifted(operator, damping), rhs), flatten(rhs))
        torch.testing.assert_close(flatten(solution.value), dense, rtol=1e-8, atol=1e-10)
        assert solution.result is Result.CONVERGED

    @pytest.mark.parametrize("num_steps", [1, 3, 7])
    @pytest.mark.parametrize("damping", [0.0, 0.5, 8.0])
    def test_a_truncated_space_minimises_the_damped_quadratic_over_itself(self, num_steps, damping):
        operator, rhs = OPERATORS["dense"][0], random_params(2)
        space = Lanczos(num_steps).expand(operator, rhs)
        solution = space.solve(damping)
        shifted = Shifted(operator, damping)
        gradient = flatten(subtract(shifted.mv(solution.value), rhs))
        assert torch.linalg.vector_norm(space.basis @ gradient) < 1e-12
        assert solution.residual == pytest.approx(norm(unflatten(gradient, rhs)) / norm(rhs), rel=1e-9)
        assert (solution.result, solution.num_steps) == (Result.MAX_STEPS, num_steps)

    @pytest.mark.parametrize("damping", [0.0, 0.5, 32.0])
    def test_quadratic_and_fall_are_those_of_the_value(self, damping):
        operator, rhs = OPERATORS["ill-conditioned"][0], random_params(2)
        space = Lanczos(5).expand(operator, rhs)
        value = space.solve(damping).value
        quadratic = float(dot(value, operator.mv(value)))
        assert space.quadratic(damping) == pytest.approx(quadratic, rel=1e-9)
        assert space.predicted_fall(damping) == pytest.approx(float(dot(rhs, value)) - 0.5 * quadratic, rel=1e-9)

    def test_undamped_fall_is_the_largest(self):
        space = Lanczos(8).expand(OPERATORS["dense"][0], random_params(2))
        falls = [space.predicted_fall(damping) for damping in (0.0, 0.5, 2.0, 8.0, 32.0)]
        assert falls == sorted(falls, reverse=True)
        assert falls[-1] > 0

    def test_basis_stays_orthonormal(self):
        """Without reorthogonalisation the outlying eigenvalue returns as ghosts."""
        size_ = 400
        values = torch.linspace(0.1, 1, size_, dtype=torch.float64)
        values[-1] = 1e5
        side = {"a": normal(size_, seed=1)}
        operator = FunctionOperator(lambda vector: {"a": values * vector["a"]})
        space = Lanczos(60).expand(operator, side)
        torch.testing.assert_close(space.basis @ space.basis.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-13)
        assert (space.ritz_values > 10).sum() == 1

    def test_ritz_values_of_the_whole_space_are_eigenvalues(self):
        eigenvalues = torch.linspace(-1.5, 4, SIZE, dtype=torch.float64)
        space = Lanczos(50).expand(with_eigenvalues(eigenvalues), random_params(2))
        torch.testing.assert_close(space.ritz_values, eigenvalues)
        assert space.smallest_ritz == pytest.approx(-1.5)
        assert space.num_steps == SIZE

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_invariant_subspace_stops_early(self, dtype):
        operator = with_eigenvalues([1.0] * 5 + [3.0] * 7, dtype=dtype)
        space = Lanczos(10).expand(operator, random_params(2, dtype))
        assert space.num_steps == 2
        assert space.solve().result is Result.CONVERGED

    @pytest.mark.parametrize(
        ("damping", "result"),
        [
            (0.0, Result.NEGATIVE_CURVATURE),
            (1.4999, Result.NEGATIVE_CURVATURE),
            (1.5001, Result.CONVERGED),
            (8.0, Result.CONVERGED),
        ],
    )
    def test_damping_below_the_smallest_ritz_value_is_refused(self, damping, result):
        operator = with_eigenvalues(torch.linspace(-1.5, 4, SIZE))
        space = Lanczos(SIZE).expand(operator, random_params(2))
        assert space.solve(damping).result is result
        if result is Result.NEGATIVE_CURVATURE:
            assert norm(space.solve(damping).value) == 0
            assert (space.quadratic(damping), space.predicted_fall(damping)) == (0.0, 0.0)

    def test_the_empty_space_of_no_force(self):
        space = Lanczos().expand(OPERATORS["dense"][0], like())
        assert (space.num_steps, space.smallest_ritz) == (0, math.inf)
        assert (space.quadratic(1.0), space.predicted_fall(1.0), space.solve(1.0).num_steps) == (0.0, 0.0, 0)

    def test_non_finite_later_on_is_told(self):
        operator, calls = OPERATORS["dense"][0], count()
        failing = FunctionOperator(lambda vector: scale(operator.mv(vector), 1.0 if next(calls) < 3 else math.inf))
        space = Lanczos(8).expand(failing, random_params(2))
        assert space.num_steps == 3
        assert space.solve(1.0).result is Result.NON_FINITE

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match="`num_steps` is 0"):
            Lanczos(0)


class TestNeumann:
    def test_the_published_recursion(self):
        operator, rhs, scaling = OPERATORS["dense"][0], random_params(2), 0.05
        value = flatten(rhs)
        for _ in range(7):
            value = flatten(rhs) + value - scaling * operator.matrix @ value
        solution = Neumann(num_steps=7, scaling=scaling).solve(operator, rhs)
        torch.testing.assert_close(flatten(solution.value), scaling * value)
        assert (solution.result, solution.num_steps) == (Result.MAX_STEPS, 7)

    def test_a_sequence_and_a_function_and_one_operator_agree(self):
        operator, rhs = OPERATORS["dense"][0], random_params(2)
        solver = Neumann(num_steps=9, scaling=0.1)
        values = [
            flatten(solver.solve(given_, rhs).value)
            for given_ in (operator, lambda step: operator, [operator] * 9, iter([operator] * 9))
        ]
        assert all(torch.equal(value, values[0]) for value in values)

    def test_steps_meet_their_batches_in_order(self):
        rhs, scaling = random_params(2), 0.1
        batches = [with_eigenvalues(spread(5), seed=seed) for seed in range(4)]
        value = flatten(rhs)
        for batch in batches:
            value = flatten(rhs) + value - scaling * batch.matrix @ value
        solver = Neumann(num_steps=4, scaling=scaling)
        for given_ in (batches, lambda step: batches[step]):
            torch.testing.assert_close(flatten(solver.solve(given_, rhs).value), scaling * value)

    def test_batches_are_unbiased(self):
        """The mean over independent runs is the solution with the mean operator."""
        mean, rhs, num_runs = with_eigenvalues(spread(4)), random_params(2), 300
        generator = torch.Generator().manual_seed(0)

        def batches():
            while True:
                noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
                yield MatrixOperator(mean.matrix + 0.3 * (noise + noise.T), like())

        solver = Neumann(num_steps=30, scaling=0.15)
        runs = torch.stack([flatten(solver.solve(batches(), rhs).value) for _ in range(num_runs)])
        expected = flatten(solver.solve(mean, rhs).value)
        standard_error = runs.std(dim=0) / math.sqrt(num_runs)
        assert (standard_error > 1e-4).all()
        assert ((runs.mean(dim=0) - expected).abs() < 5 * standard_error).all()

    @pytest.mark.parametrize("factor", [2.05, 3.0, 1e6, 1e200])
    def test_too_large_a_scaling_is_divergence(self, factor):
        operator = with_eigenvalues(spread(10))
        solution = Neumann(num_steps=200, scaling=factor / 10).solve(operator, random_params(2))
        assert solution.result is Result.DIVERGED
        assert all_finite(solution.value)
        assert norm(solution.value) == 0

    @pytest.mark.parametrize("factor", [0.5, 1.0, 1.9])
    def test_a_scaling_below_twice_the_inverse_converges(self, factor):
        operator, rhs = with_eigenvalues(spread(10)), random_params(2)
        solution = Neumann(num_steps=2000, scaling=factor / 10, rtol=1e-9).solve(operator, rhs)
        assert solution.result is Result.CONVERGED
        assert error(solution, unflatten(torch.linalg.solve(operator.matrix, flatten(rhs)), rhs)) < 1e-7

    def test_slow_divergence_is_seen_before_the_residual_is_large(self):
        operator = diagonal([-0.05, *([1.0] * (SIZE - 1))])
        rhs = unflatten(torch.tensor([0.01, *([1.0] * (SIZE - 1))], dtype=torch.float64), like())
        solution = Neumann(num_steps=64, scaling=0.9).solve(operator, rhs)
        assert solution.residual < 1
        assert solution.result is Result.DIVERGED

    def test_batches_diverge_too(self):
        batches = [with_eigenvalues(spread(10), seed=seed) for seed in range(3)]
        solution = Neumann(num_steps=60, scaling=0.6).solve(lambda step: batches[step % 3], random_params(2))
        assert solution.result is Result.DIVERGED
        assert solution.num_steps < 60

    @pytest.mark.parametrize("size_", [1, 5, 2000])
    @pytest.mark.parametrize("scale_", [1e-6, 1.0, 1e8])
    def test_power_scaling_suits_the_operator(self, size_, scale_):
        values = scale_ * torch.linspace(0.5, 1, size_, dtype=torch.float64)
        values[-1] = 6 * scale_
        rhs = {"a": normal(size_, seed=1)}
        operator = FunctionOperator(lambda vector: {"a": values * vector["a"]})
        solution = Neumann(num_steps=600, rtol=1e-8).solve(operator, rhs)
        assert solution.result is Result.CONVERGED
        torch.testing.assert_close(solution.value["a"], rhs["a"] / values, rtol=1e-6, atol=0)

    def test_power_scaling_depends_on_its_seed_alone(self):
        operator, rhs = OPERATORS["dense"][0], random_params(2)
        one, same, other = (
            flatten(Neumann(num_steps=5, power_steps=2, seed=seed).solve(operator, rhs).value) for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_a_sequence_that_ends_is_refused(self):
        operator = OPERATORS["dense"][0]
        with pytest.raises(ValueError, match="ran out"):
            Neumann(num_steps=5, scaling=0.01).solve([operator] * 4, random_params(2))

    def test_what_is_no_operator_is_refused(self):
        with pytest.raises(ValueError, match="is a float"):
            Neumann(scaling=0.1).solve(3.0, random_params(2))

    @pytest.mark.parametrize(
        "settings", [{"scaling": 0.0}, {"scaling": -1.0}, {"scaling": "auto"}, {"num_steps": 0}, {"power_steps": 0}]
    )
    def test_settings_are_checked(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Neumann(**settings)


class TestCholesky:
    def test_dead_coordinates_stay_where_they_are(self):
        """A scale written as exp(scale) · unit-lower-triangular(free): the free matrix has dead entries."""
        dimension = 5
        at = {
            "loc": torch.zeros(dimension).double(),
            "scale": 0.1 * normal(dimension, seed=1),
            "free": 0.3 * normal(dimension, dimension, seed=2),
        }
        precision = normal(dimension, dimension, seed=3)
        precision = precision @ precision.T + torch.eye(dimension).double()

        def energy(params):
            eye = torch.eye(dimension, dtype=torch.float64)
            triangular = params["scale"].exp()[:, None] * (params["free"].tril(-1) + eye)
            quadratic = params["loc"] @ precision @ params["loc"] + (triangular.T @ precision @ triangular).trace()
            # Convex near here: the log-determinant and a pull on the scale.
            return 0.5 * quadratic - params["scale"].sum() + 20 * params["scale"].square().sum()

        gradient = torch.func.grad(energy)
        operator = FunctionOperator(lambda vector: torch.func.vjp(gradient, at)[1](vector)[0])
        matrix = as_matrix(operator, at)
        assert size(at) == 35
        assert torch.linalg.matrix_rank(matrix) == 20
        force = gradient(at)
        solution = Cholesky().solve(operator, force)
        assert solution.result is Result.CONVERGED
        torch.testing.assert_close(
            flatten(solution.value), torch.linalg.pinv(matrix) @ flatten(force), rtol=1e-7, atol=1e-12
        )
        assert (solution.value["free"].triu() == 0).all()
        assert (solution.value["free"].tril(-1) != 0).sum() == 10

    def test_relatively_tiny_rows_are_dead(self):
        operator = diagonal([1e-20, 1e-3, *([1.0] * (SIZE - 2))])
        rhs = operator.mv(random_params(2))
        solution = Cholesky().solve(operator, rhs)
        assert solution.result is Result.CONVERGED
        assert flatten(solution.value)[0] == 0
        torch.testing.assert_close(flatten(solution.value)[1:], flatten(random_params(2))[1:])

    def test_a_force_on_a_dead_coordinate_is_singular(self):
        solution = Cholesky().solve(diagonal([0.0, *([2.0] * (SIZE - 1))]), random_params(2))
        assert solution.result is Result.SINGULAR
        torch.testing.assert_close(flatten(solution.value)[1:], flatten(random_params(2))[1:] / 2)

    def test_units_do_not_make_it_singular(self):
        units = torch.logspace(-10, 10, SIZE, dtype=torch.float64)
        matrix = units[:, None] * with_eigenvalues(spread(3)).matrix * units
        truth = unflatten(normal(SIZE, seed=3) / units, like())
        operator = MatrixOperator(matrix, like())
        solution = Cholesky(dead_rtol=0.0).solve(operator, operator.mv(truth))
        assert solution.result is Result.CONVERGED
        torch.testing.assert_close(solution.value, truth, rtol=1e-9, atol=0)

    def test_a_live_coordinate_without_diagonal_is_indefinite(self):
        matrix = 2 * torch.eye(SIZE).double()
        matrix[0, 0], matrix[0, 1], matrix[1, 0] = 0.0, 0.5, 0.5
        assert Cholesky().solve(MatrixOperator(matrix, like()), random_params(2)).result is Result.NEGATIVE_CURVATURE

    @pytest.mark.parametrize("seed", range(8))
    def test_a_matrix_without_full_rank_is_singular_whatever_its_rounding(self, seed):
        operator = with_eigenvalues([0.0, *torch.linspace(1, 4, SIZE - 1)], seed=seed)
        solution = Cholesky().solve(operator, operator.mv(random_params(2)))
        assert solution.result is Result.SINGULAR
        assert norm(solution.value) == 0

    def test_rounding_of_the_products_is_averaged_out(self):
        matrix = with_eigenvalues(spread(10)).matrix
        twisted = MatrixOperator(matrix + 1e-3 * (normal(SIZE, SIZE, seed=5).tril(-1)), like())
        symmetric = 0.5 * (twisted.matrix + twisted.matrix.T)
        solution = Cholesky().solve(twisted, random_params(2))
        torch.testing.assert_close(flatten(solution.value), torch.linalg.solve(symmetric, flatten(random_params(2))))
