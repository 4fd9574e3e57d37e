"""The derivative of a function in one direction, recorded, and played in other directions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_forget.params import Params

WORTH_RECORDING = 10_000_000
# Of how many batches graphs or tapes are kept: what more of them would take is no longer a batch's memory.
MAX_KEPT_BATCHES = 4


class NoForwardDerivative(RuntimeError):
    """Torch cannot differentiate a function forward, or its operations hide what they depend on."""


def pays(num_weights: int, num_rows: int) -> bool:
    """Whether a function of so many weights and rows is worth recording; a small one is kept as a graph.

    A tape is played in Python, a graph differentiated twice in C++; they are level at a gradient of about a
    millisecond.
    """
    return num_weights * num_rows >= WORTH_RECORDING


def forward_derivative(function: Callable[[Params], Params], point: Params, tangent: Params) -> tuple[Params, Params]:
    """(function(point), J · tangent), nothing kept.

    Raises:
        NoForwardDerivative: torch has none.
    """
    try:
        with torch.no_grad():
            return torch.func.jvp(function, (point,), (tangent,))  # type: ignore[return-value]
    except RuntimeError as error:
        raise NoForwardDerivative(str(error)) from error


@dataclass(frozen=True)
class Tape:
    """J of a function at one point, kept as the operations that carry a tangent through it.

    Forward-mode differentiation computes the function along with its derivative. What does not depend on the tangent
    is the same in every direction, so it is computed while recording and only the rest is played: a Hessian product
    then costs little more than a gradient. `torch.func.linearize` gives the same by tracing and compiling a graph,
    which takes as long as a dozen gradients of a small network; recording is itself the first product.

    Attributes:
        start: the slot of each entry's tangent.
        steps: the operations in order.
        free: after each step, the slots that no later one needs.
        end: the slot of each output's tangent; None where the output does not depend on the point.
        value: the outputs at the point.
    """

    start: dict[str, int]
    steps: list["_Step"]
    free: list[list[int]]
    end: dict[str, int | None]
    value: Params

    @staticmethod
    def record(function: Callable[[Params], Params], point: Params, tangent: Params) -> tuple[Params, "Tape"]:
        """(J · tangent, the tape).

        Raises:
            NoForwardDerivative: the function cannot be differentiated forward, or not played again.
        """
        recorder = _Recorder()
        with torch.no_grad(), forward_ad.dual_level():
            moves = _own(tangent, point)
            start = {name: recorder.new_slot(move) for name, move in moves.items()}
            try:
                with recorder:
                    duals = {name: forward_ad.make_dual(value.detach(), moves[name]) for name, value in point.items()}
                    found = {name: forward_ad.unpack_dual(value) for name, value in function(duals).items()}
            except RuntimeError as error:
                raise NoForwardDerivative(str(error)) from error
            end = {name: recorder.slot_of(tangent) for name, (_, tangent) in found.items()}
            value = {name: primal.detach() for name, (primal, _) in found.items()}
            images = {name: None if tangent is None else tangent.clone() for name, (_, tangent) in found.items()}
        recorder.check()
        steps, free = _pruned(recorder.steps, {slot for slot in end.values() if slot is not None})
        return _filled(images, value), Tape(start, steps, free, end, value)

    def play(self, tangent: Params) -> Params:
        """J · tangent."""
        moves = _own(tangent, self.start)
        slots = {self.start[name]: move for name, move in moves.items()}
        with torch.no_grad():
            for step, free in zip(self.steps, self.free, strict=True):
                step.play(slots)
                for slot in free:
                    slots.pop(slot, None)
        return _filled({name: None if slot is None else slots[slot] for name, slot in self.end.items()}, self.value)


@dataclass(frozen=True)
class _Step:
    """One operation on tangents.

    Attributes:
        operator: what is called.
        inputs: its arguments, flat; None in the places of tangents.
        spec: how they are nested.
        tangents: (place among the inputs, slot) of each tangent.
        outputs: the slot of each output; None for what is no tensor.
        writes: whether it changes an argument.
    """

    operator: Any
    inputs: list[Any]
    spec: TreeSpec
    tangents: list[tuple[int, int]]
    outputs: list[int | None]
    writes: bool

    @property
    def sources(self) -> set[int]:
        """The slots that it reads."""
        return {slot for _, slot in self.tangents}

    def play(self, slots: dict[int, Tensor]) -> None:
        """Call it on the tangents in their slots."""
        inputs = list(self.inputs)
        for place, slot in self.tangents:
            inputs[place] = slots[slot]
        args, kwargs = tree_unflatten(inputs, self.spec)
        values = tree_flatten(self.operator(*args, **kwargs))[0]
        slots.update({slot: value for slot, value in zip(self.outputs, values, strict=True) if slot is not None})


class _Recorder(TorchDispatchMode):
    """Keeps every operation that has a tangent among its arguments, below autograd and `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._slots: dict[int, int] = {}
        self._storages: set[int] = set()
        self._shared: set[int] = set()
        # Alive, so that no other tensor gets their identity or their memory while recording.
        self._tangents: list[Tensor] = []
        self._constants: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs, spec = tree_flatten((args, kwargs or {}))
        known = [(place, self._known(value)) for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        tangents = [(place, slot) for place, slot in known if slot is not None]
        if tangents:
            for value in _written(operator, args, kwargs or {}):
                if self._slots.get(id(value)) in {None, *self._shared}:
                    raise NoForwardDerivative(f"{operator} writes a tangent into what others read, or what is none.")
        found = operator(*args, **(kwargs or {}))
        if tangents:
            self._keep(operator, inputs, spec, tangents, tree_flatten(found)[0])
        return found

    def new_slot(self, tangent: Tensor, same_as: int | None = None) -> int:
        """The slot of a tangent; one that was written in place keeps its own."""
        self._storages.add(tangent.untyped_storage()._cdata)
        self._tangents.append(tangent)
        if same_as is not None:
            self._shared.add(same_as)
        return self._slots.setdefault(id(tangent), len(self._tangents) - 1 if same_as is None else same_as)

    def slot_of(self, tangent: Tensor | None) -> int | None:
        """The slot of an output's tangent; None where it is zero whatever the direction."""
        slot = None if tangent is None else self._known(tangent)
        if tangent is not None and slot is None and bool(tangent.any()):
            raise NoForwardDerivative("An output's tangent came from operations that were not seen.")
        return slot

    def check(self) -> None:
        """Raise where a constant was changed after it was used."""
        if any(value._version != version for value, version in self._constants):
            raise NoForwardDerivative("A value was changed in place after a tangent had met it.")

    def _keep(self, operator: Any, inputs: list[Any], spec: Any, tangents: Any, outputs: list[Any]) -> None:
        if _adds_nothing(operator, inputs, tangents, outputs):
            # Such as what the image of a convolution, which does not move, is said to contribute.
            self.new_slot(outputs[0], same_as=tangents[0][1])
            return
        places = {place for place, _ in tangents}
        rest = [None if place in places else value for place, value in enumerate(inputs)]
        self._constants += [(value, value._version) for value in rest if isinstance(value, Tensor)]
        slots = [self.new_slot(value) if isinstance(value, Tensor) else None for value in outputs]
        self.steps.append(_Step(operator, rest, spec, tangents, slots, operator._schema.is_mutable))

    def _known(self, value: Tensor) -> int | None:
        slot = self._slots.get(id(value))
        if slot is None and value.untyped_storage()._cdata in self._storages and value.numel():
            raise NoForwardDerivative("A tangent was reached by another tensor that shares its memory.")
        return slot


def _adds_nothing(operator: Any, inputs: list[Any], tangents: list[tuple[int, int]], outputs: list[Any]) -> bool:
    """Whether this is a tangent + 0, or 0 + a tangent."""
    if operator is not torch.ops.aten.add.Tensor or len(inputs) > 2 or len(tangents) > 1:
        return False
    place = tangents[0][0]
    mine, other, found = inputs[place], inputs[1 - place], outputs[0]
    same = mine.shape == found.shape and mine.dtype == found.dtype
    return same and isinstance(other, Tensor) and not bool(other.any())


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    if operator._schema.is_mutable:
        for place, argument in enumerate(operator._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _pruned(steps: list[_Step], needed: set[int]) -> tuple[list[_Step], list[list[int]]]:
    """The steps that the result needs, and what can be dropped after each; what writes may write into a view."""
    kept: list[_Step] = []
    free: list[list[int]] = []
    alive = set(needed)
    for step in reversed(steps):
        made = {slot for slot in step.outputs if slot is not None}
        if not (step.writes or made & alive):
            continue
        kept.append(step)
        free.append(sorted((step.sources | made) - alive))
        alive |= step.sources
    return kept[::-1], free[::-1]


def _own(tangent: Params, like: Any) -> Params:
    """Contiguous copies, which an operation may write into."""
    return {name: tangent[name].detach().clone(memory_format=torch.contiguous_format) for name in like}


def _filled(images: dict[str, Tensor | None], like: Params) -> Params:
    return {name: torch.zeros_like(like[name]) if image is None else image for name, image in images.items()}
