"""The Hessian of an energy in its own params."""

from collections.abc import Callable
from functools import reduce
from typing import Protocol, cast

import torch
from torch import Tensor

from pyro_forget.curvature.jacobian import Jacobian
from pyro_forget.curvature.tape import MAX_KEPT_BATCHES, NoForwardDerivative, Tape, forward_derivative, pays
from pyro_forget.data import Batch, Data
from pyro_forget.energy import Energy, WeightSpace, weight_space
from pyro_forget.params import Params, add, map_params, size

MODES = ("graph", "tape", "stream")


class Hessian:
    """∇²F(γ, data).

    Products are made in one of three ways:

    - "graph": the graph of the gradient is kept, and a product is its derivative: 2.4 gradients;
    - "tape": the likelihood's gradient, as a function of the weights that the model is run with, is differentiated
      forward once and that is played again: 1.2 gradients. What a guide adds (its map to weights, its KL divergence)
      is a formula for each entry and keeps its graph;
    - "stream": forward over reverse, batch by batch, nothing kept but the guide's graph: 2.9 gradients.

    Left to itself it keeps what it can: at most four batches, by a tape where a batch's rows times its weights are
    ten million or more (below that, Python's bookkeeping would cost more than the graph), by the graph otherwise; it
    streams where there are more, so that memory does not grow with the data. Where torch has no forward derivative of
    a model, and for energies written by hand, tapes become graphs and streams differentiate backwards twice. All give
    the same numbers to rounding.

    Args:
        energy: with its noise pinned, or products do not agree.
        params: γ.
        data: S.
        mode: one of the three ways; None to choose.
    """

    def __init__(self, energy: Energy, params: Params, data: Data, mode: str | None = None) -> None:
        if mode not in (None, *MODES):
            raise ValueError(f"`mode` must be one of {MODES} or None, got {mode!r}.")
        self.energy, self.data = energy, data
        self.params = {name: value.detach() for name, value in params.items()}
        self.num_products = 0
        space = weight_space(energy)
        self.mode = mode or _choose(space, self.params, data)
        make = _Twice if self.mode == "stream" else _Graph
        self._products = self._fallback = cast(_Products, make(energy, self.params, data))
        if self.mode != "graph" and space is not None:
            self._products = _InWeights(space, self.params, data, keep=self.mode == "tape")

    def mv(self, vector: Params) -> Params:
        """∇²F · vector."""
        self.num_products += 1
        try:
            return self._products.mv(vector)
        except NoForwardDerivative:
            self._products = self._fallback
            return self._products.mv(vector)


class _Products(Protocol):
    def mv(self, vector: Params) -> Params: ...


class _Graph:
    """The gradient's graph, kept."""

    def __init__(self, energy: Energy, params: Params, data: Data) -> None:
        self.energy, self.params, self.data = energy, params, data
        self._graph: tuple[Params, Params] | None = None

    def mv(self, vector: Params) -> Params:
        if self._graph is None:
            self._graph = gradient_graph(lambda leaves: self.energy.total(leaves, self.data), self.params)
        return product_of(self._graph, vector, keep=True)


class _Twice:
    """Two derivatives backwards, batch by batch."""

    def __init__(self, energy: Energy, params: Params, data: Data) -> None:
        self.energy, self.params, self.data = energy, params, data

    def mv(self, vector: Params) -> Params:
        state: list[bool] = []

        def of(batch: Batch) -> Params:
            # A hand-written energy knows its prior only together with a batch, so the first batch brings it.
            first = not state
            state.append(True)

            def energy(leaves: Params) -> Tensor:
                return self.energy.estimate(leaves, batch, len(batch)) if first else self.energy.share(leaves, batch)

            return product_of(gradient_graph(energy, self.params), vector, keep=False)

        return self.data.reduce(of)


class _InWeights:
    """WᵀHW + ∇²(prior + ⟨∇likelihood, weights⟩), W the derivative of the weights, H of the likelihood in them."""

    def __init__(self, space: WeightSpace, params: Params, data: Data, keep: bool) -> None:
        self.space, self.params, self.data, self.keep = space, params, data, keep
        self._map = Jacobian(space.weights, params)
        self._weights = map_params(Tensor.detach, self._map.outputs)
        self._tapes: list[Tape] = []
        self._rest: tuple[Params, Params] | None = None

    def mv(self, vector: Params) -> Params:
        tangent = self._map.push(vector)
        if self._rest is not None and self._tapes:
            image = reduce(add, (tape.play(tangent) for tape in self._tapes))
        else:
            slope, image = self.data.reduce(lambda batch: self._slope_and_product(batch, tangent))
            self._rest = self._rest or self._graph_of_the_rest(slope)
        return add(self._map.pull(image), product_of(self._rest, vector, keep=True))

    def _slope_and_product(self, batch: Batch, tangent: Params) -> tuple[Params, Params]:
        slope = torch.func.grad(lambda weights: self.space.likelihood(weights, batch))
        if not self.keep:
            return forward_derivative(slope, self._weights, tangent)
        image, tape = Tape.record(slope, self._weights, tangent)
        self._tapes.append(tape)
        return tape.value, image

    def _graph_of_the_rest(self, slope: Params) -> tuple[Params, Params]:
        def rest(leaves: Params) -> Tensor:
            weights = self.space.weights(leaves)
            moved = [(slope[name] * weights[name]).sum().double() for name in weights]
            return torch.stack(moved).sum() + self.space.prior(leaves).double()

        return gradient_graph(rest, self.params)


def _choose(space: WeightSpace | None, params: Params, data: Data) -> str:
    if data.num_data > MAX_KEPT_BATCHES * data.batch_size:
        return "stream"
    if space is None:
        return "graph"
    with torch.no_grad():
        num_weights = size(space.weights(params))
    return "tape" if pays(num_weights, min(data.num_data, data.batch_size)) else "graph"


def gradient_graph(function: Callable[[Params], Tensor], params: Params) -> tuple[Params, Params]:
    """(leaves, gradient with its graph)."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in params.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(
            function(leaves), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
    return leaves, dict(zip(leaves, found, strict=True))


def product_of(graph: tuple[Params, Params], vector: Params, keep: bool) -> Params:
    """The derivative of ⟨gradient, vector⟩."""
    leaves, gradient = graph
    live = [name for name in leaves if gradient[name].requires_grad]
    if not live:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [gradient[name] for name in live],
        list(leaves.values()),
        [vector[name] for name in live],
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))
