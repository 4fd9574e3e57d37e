import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_forget.curvature import (
    Congruence,
    FunctionOperator,
    MatrixOperator,
    Scaled,
    Shifted,
    as_matrix,
    check_deterministic,
    matmat,
)
from pyro_forget.curvature.operator import FlatOperator, from_rows, map_rows, to_rows
from pyro_forget.params import add, axpy, dot, flatten, map_params, scale, unflatten

SHAPES = {"weight": (2, 2), "bias": (), "loc": (3,), "nothing": (0,)}
SIZE = 8


def like(dtype=torch.float64):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def random_params(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return unflatten(torch.randn(SIZE, generator=generator, dtype=torch.float64).to(dtype), like(dtype))


def random_matrix(seed):
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_matrix(seed):
    matrix = random_matrix(seed)
    return matrix + matrix.T


ROOT = random_matrix(7).tril() + 3 * torch.eye(SIZE, dtype=torch.float64)
ROOT_PAIR = (MatrixOperator(ROOT, like()).mv, MatrixOperator(ROOT.T, like()).mv)
METRIC = map_params(lambda value: 1 + value.abs(), random_params(5))
DENSE = MatrixOperator(symmetric_matrix(0), like())

# Each operator beside the matrix it stands for.
CASES = {
    "matrix": (DENSE, DENSE.matrix),
    "function": (FunctionOperator(DENSE.mv), DENSE.matrix),
    "scaled": (Scaled(DENSE, -2.5), -2.5 * DENSE.matrix),
    "shifted": (Shifted(DENSE, 0.7), DENSE.matrix + 0.7 * torch.eye(SIZE, dtype=torch.float64)),
    "metric": (Shifted(DENSE, 0.7, METRIC), DENSE.matrix + 0.7 * torch.diag(flatten(METRIC))),
    "diagonal root": (
        Congruence(DENSE, METRIC),
        flatten(METRIC)[:, None] * DENSE.matrix * flatten(METRIC),
    ),
    "triangular root": (Congruence(DENSE, ROOT_PAIR), ROOT.T @ DENSE.matrix @ ROOT),
    "nested": (
        Shifted(Congruence(FunctionOperator(DENSE.mv), ROOT_PAIR), 2.0),
        ROOT.T @ DENSE.matrix @ ROOT + 2.0 * torch.eye(SIZE, dtype=torch.float64),
    ),
}
cases = pytest.mark.parametrize(("operator", "matrix"), CASES.values(), ids=CASES.keys())
seeds = st.integers(0, 2**31)


@cases
def test_an_operator_is_its_matrix(operator, matrix):
    torch.testing.assert_close(as_matrix(operator, like()), matrix)
    vector = random_params(1)
    torch.testing.assert_close(flatten(operator.mv(vector)), matrix @ flatten(vector))


@cases
def test_many_products_are_single_products(operator, matrix):
    block = map_params(lambda *rows: torch.stack(rows), *(random_params(seed) for seed in (1, 2, 3)))
    products = matmat(operator, block)
    assert {name: value.shape for name, value in products.items()} == {name: v.shape for name, v in block.items()}
    for row in range(3):
        single = operator.mv({name: value[row] for name, value in block.items()})
        torch.testing.assert_close({name: value[row] for name, value in products.items()}, single)


@cases
@settings(max_examples=20, deadline=None)
@given(first=seeds, second=seeds, factor=st.floats(-100, 100))
def test_products_are_linear_and_symmetric(operator, matrix, first, second, factor):
    left, right = random_params(first), random_params(second)
    image, other = operator.mv(left), operator.mv(right)
    expected = axpy(factor, other, image)
    torch.testing.assert_close(operator.mv(axpy(factor, right, left)), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dot(right, image), dot(left, other), rtol=1e-9, atol=1e-9)


def test_dense_oracle_keeps_rows_and_columns_apart():
    matrix = random_matrix(3)
    assert not torch.allclose(matrix, matrix.T)
    torch.testing.assert_close(as_matrix(MatrixOperator(matrix, like()), like()), matrix)


def test_dense_oracle_is_in_the_type_of_its_params():
    single = like(torch.float32)
    assert as_matrix(MatrixOperator(DENSE.matrix, single), single).dtype == torch.float32


def test_congruence_recovers_the_solution_in_the_first_coordinates():
    operator = Congruence(Shifted(DENSE, 20.0), ROOT_PAIR)
    rhs = random_params(4)
    coordinates = torch.linalg.solve(as_matrix(operator, rhs), flatten(operator.transposed(rhs)))
    value = flatten(operator.forward(unflatten(coordinates, rhs)))
    torch.testing.assert_close(value, torch.linalg.solve(as_matrix(operator.operator, rhs), flatten(rhs)))


def test_vectors_keep_their_types():
    mixed = like() | {"bias": torch.zeros((), dtype=torch.float32)}
    image = Shifted(FunctionOperator(lambda vector: scale(vector, 2.0)), 1.0).mv(mixed)
    assert {name: value.dtype for name, value in image.items()} == {name: v.dtype for name, v in mixed.items()}
    assert from_rows(to_rows(map_params(lambda v: v[None], mixed), mixed), mixed)["bias"].dtype == torch.float32


def test_names_may_come_back_in_another_order():
    reordered = FunctionOperator(lambda vector: dict(reversed(DENSE.mv(vector).items())))
    torch.testing.assert_close(as_matrix(reordered, like()), DENSE.matrix)
    torch.testing.assert_close(FlatOperator(reordered, like()).mv(torch.eye(SIZE).double()[2]), DENSE.matrix[:, 2])


@pytest.mark.parametrize(
    "function",
    [
        lambda vector: {name: value for name, value in vector.items() if name != "bias"},
        lambda vector: vector | {"loc": vector["loc"][:2]},
        lambda vector: vector | {"more": vector["loc"]},
    ],
)
def test_a_product_of_other_names_or_shapes_is_refused(function):
    with pytest.raises(ValueError, match="belong here"):
        FlatOperator(FunctionOperator(function), like()).mv(torch.ones(SIZE).double())


def test_products_are_detached():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    operator = FlatOperator(FunctionOperator(lambda vector: scale(vector, weight)), like())
    assert not operator.mv(torch.ones(SIZE).double()).requires_grad
    assert not operator.matmat(torch.ones(2, SIZE).double()).requires_grad


def test_map_rows_returns_what_the_function_returns():
    block = {"a": torch.arange(6.0).reshape(3, 2)}
    torch.testing.assert_close(map_rows(lambda row: {"sum": row["a"].sum()}, block), {"sum": torch.tensor([1.0, 5, 9])})


def test_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*8 entries"):
        MatrixOperator(torch.eye(3), like())


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_is_finite_and_not_negative(damping):
    with pytest.raises(ValueError, match="`damping` is"):
        Shifted(DENSE, damping)


class TestDeterminism:
    @cases
    def test_true_operators_pass(self, operator, matrix):
        check_deterministic(operator, like())

    def test_single_precision_passes(self):
        single = like(torch.float32)
        check_deterministic(MatrixOperator(DENSE.matrix.float(), single), single)

    def test_zero_passes(self):
        check_deterministic(Scaled(DENSE, 0.0), like())

    @pytest.mark.parametrize("amount", [1e-6, 1.0])
    def test_noise_is_caught(self, amount):
        generator = torch.Generator().manual_seed(3)

        def noisy(vector):
            factor = 1 + amount * torch.randn((), generator=generator, dtype=torch.float64)
            return scale(DENSE.mv(vector), factor)

        with pytest.raises(ValueError, match=r"not deterministic.*with_noise"):
            check_deterministic(FunctionOperator(noisy), like(), linear=False, symmetric=False)

    def test_batches_in_turn_are_caught(self):
        turns = iter(range(100))
        operator = FunctionOperator(lambda vector: scale(vector, 1.0 + next(turns) % 2))
        with pytest.raises(ValueError, match="not deterministic"):
            check_deterministic(operator, like())

    def test_a_constant_term_is_caught(self):
        constant = scale(random_params(2), 1e-3)
        operator = FunctionOperator(lambda vector: add(DENSE.mv(vector), constant))
        with pytest.raises(ValueError, match="not linear"):
            check_deterministic(operator, like())

    def test_a_curve_is_caught(self):
        with pytest.raises(ValueError, match="not linear"):
            check_deterministic(FunctionOperator(lambda vector: map_params(torch.tanh, vector)), like())

    def test_asymmetry_is_caught_unless_allowed(self):
        operator = MatrixOperator(random_matrix(3), like())
        with pytest.raises(ValueError, match="not symmetric"):
            check_deterministic(operator, like())
        with pytest.raises(ValueError, match="not symmetric"):
            check_deterministic(operator, like(), linear=False)
        check_deterministic(operator, like(), symmetric=False)

    def test_nan_is_caught(self):
        with pytest.raises(ValueError, match="NaN or infinite"):
            check_deterministic(Scaled(DENSE, float("nan")), like())

    def test_tolerance_is_the_callers(self):
        turns = iter(range(100))
        operator = FunctionOperator(lambda vector: scale(vector, 1.0 + 1e-4 * (next(turns) % 2)))
        check_deterministic(operator, like(), rtol=1e-3)

    def test_products_spent(self):
        for options, expected in [
            ({}, 4),
            ({"linear": False}, 3),
            ({"symmetric": False}, 4),
            ({"linear": False, "symmetric": False}, 2),
        ]:
            calls = []
            operator = FunctionOperator(lambda vector, calls=calls: (calls.append(1), DENSE.mv(vector))[1])
            check_deterministic(operator, like(), **options)
            assert len(calls) == expected

    def test_global_generator_is_untouched(self):
        before = torch.get_rng_state()
        check_deterministic(DENSE, like())
        assert torch.equal(before, torch.get_rng_state())
