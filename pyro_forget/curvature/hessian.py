"""The Hessian of an energy in its own params."""

import torch

from pyro_forget.data import Batch, Data
from pyro_forget.energy import Energy
from pyro_forget.params import Params


class Hessian:
    """∇²F(γ, data).

    The first gradient's graph is kept when the data are one batch; otherwise each product differentiates twice,
    batch by batch, and memory does not grow with the data.

    Args:
        energy: with its noise pinned, or products do not agree.
        params: γ.
        data: S.
    """

    def __init__(self, energy: Energy, params: Params, data: Data) -> None:
        self.energy, self.data = energy, data
        self.params = {name: value.detach() for name, value in params.items()}
        self._keep = data.num_data <= data.batch_size
        self._graph: tuple[Params, Params] | None = None
        self.num_products = 0

    def mv(self, vector: Params) -> Params:
        """∇²F · vector."""
        self.num_products += 1
        if self._keep:
            if self._graph is None:
                self._graph = gradient_graph(lambda leaves: self.energy.total(leaves, self.data), self.params)
            return product_of(self._graph, vector, keep=True)
        return self._stream(vector)

    def _stream(self, vector: Params) -> Params:
        state: list[bool] = []

        def of(batch: Batch) -> Params:
            # A hand-written energy knows its prior only together with a batch, so the first batch brings it.
            first = not state
            state.append(True)

            def energy(leaves: Params) -> torch.Tensor:
                return self.energy.total(leaves, _only(self.data, batch)) if first else self.energy.share(leaves, batch)

            return product_of(gradient_graph(energy, self.params), vector, keep=False)

        return self.data.reduce(of)


def gradient_graph(function: object, params: Params) -> tuple[Params, Params]:
    """(leaves, gradient with its graph)."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in params.items()}
    with torch.enable_grad():
        value = function(leaves)  # type: ignore[operator]
        found = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
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


def _only(data: Data, batch: Batch) -> Data:
    """The rows of one batch as data."""
    return data.split(batch.ids)[0]
