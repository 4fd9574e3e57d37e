"""Pyro's parameter store for the length of a run, and what a run reads from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from torch import nn
from torch.distributions import constraints

from pyro_forget.params import Params


@contextmanager
def filled_store(params: Params, limits: dict[str, Any]) -> Iterator[None]:
    """Within the context the store holds these unconstrained tensors and nothing else."""
    store = pyro.get_param_store()
    with store.scope():
        for name, value in params.items():
            store._params[name] = value
            store._constraints[name] = limits.get(name, constraints.real)
            store._param_to_name[value] = name
        yield


@contextmanager
def loaded_store(params: Params, limits: dict[str, Any]) -> Iterator[None]:
    """The same with trainable copies: what a further SVI does to them ends with the context."""
    trainable = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    with filled_store(trainable, limits):
        yield


@contextmanager
def modules_as_they_are() -> Iterator[None]:
    """Within the context `pyro.module` hands its module back untouched.

    A PyroModule registers its plain submodules so. Their tensors have been substituted already; the store would
    replace them by copies that are cut off from the gradient.
    """
    original = pyro.module

    def unregistered(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
        return nn_module

    pyro.module = unregistered
    try:
        yield
    finally:
        pyro.module = original


def read_store(run: Callable[[], Any], fresh: bool) -> tuple[Params, dict[str, Any], set[str]]:
    """(the store's unconstrained tensors that `run` touches, their constraints, the names that it made anew).

    The run sees the store as it is, or an empty one where `fresh`; the store itself stays as it was.
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    state = None if fresh else store.get_state()
    with pyro.poutine.block(), store.scope(state), pyro.poutine.trace(param_only=True) as trace:
        run()
        touched = [name for name in trace.trace.nodes if name in store._params]
        params = {name: store._params[name] for name in touched}
        limits = {name: store._constraints[name] for name in touched}
    return params, limits, set(touched) - before
