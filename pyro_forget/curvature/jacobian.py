"""The Jacobian of a function at one point, as two products."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_forget.curvature.tape import NoForwardDerivative, Tape, forward_derivative
from pyro_forget.params import Params, zeros_like


class Jacobian:
    """J of a function's outputs in its params.

    Args:
        function: params to outputs by name.
        point: where.
        way: how J · v is made: "graph", as the derivative of Jᵀu in u, whose graph is kept; "tape", played from a
            recording, which pays for large functions; "forward", along with the function itself, nothing kept. Where
            torch has no forward derivative, by the graph.
    """

    def __init__(self, function: Callable[[Params], Params], point: Params, way: str = "graph") -> None:
        self._function, self._way = function, way
        self._leaves = {name: value.detach().requires_grad_(True) for name, value in point.items()}
        with torch.enable_grad():
            self.outputs = function(self._leaves)
        self._tape: Tape | None = None
        self._transposed: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    @property
    def _live(self) -> list[str]:
        """The outputs that the params move."""
        return [name for name, value in self.outputs.items() if value.requires_grad]

    def push(self, vector: Params) -> Params:
        """J · vector."""
        if not self._live:
            return zeros_like(self.outputs)
        if self._way != "graph":
            try:
                return self._push_forward(vector)
            except NoForwardDerivative:
                self._way = "graph"
        return self._push_by_transposing_twice(vector)

    def pull(self, vector: Params) -> Params:
        """Jᵀ · vector."""
        if not self._live:
            return zeros_like(self._leaves)
        outputs, cotangents = [self.outputs[name] for name in self._live], [vector[name] for name in self._live]
        return dict(zip(self._leaves, _grad(outputs, list(self._leaves.values()), cotangents), strict=True))

    def _push_forward(self, vector: Params) -> Params:
        if self._way == "forward":
            return forward_derivative(self._function, self._leaves, vector)[1]
        if self._tape is not None:
            return self._tape.play(vector)
        image, self._tape = Tape.record(self._function, self._leaves, vector)
        return image

    def _push_by_transposing_twice(self, vector: Params) -> Params:
        found = zeros_like(self.outputs)
        outputs = [self.outputs[name] for name in self._live]
        if self._transposed is None:
            dummies = [torch.zeros_like(value, requires_grad=True) for value in outputs]
            self._transposed = dummies, _grad(outputs, list(self._leaves.values()), dummies, create_graph=True)
        dummies, pulled = self._transposed
        pairs = [(p, vector[name]) for p, name in zip(pulled, self._leaves, strict=True) if p.requires_grad]
        tangents = _grad([p for p, _ in pairs], dummies, [v for _, v in pairs])
        return found | dict(zip(self._live, tangents, strict=True))


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product; zeros for inputs that play no part. The graph stays for the next product."""
    return torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
