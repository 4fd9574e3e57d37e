"""A program's learned parameters: read once, substituted in every run, written back into a copy.

Pyro keeps parameters in a global store whose names win over the tensors of a module. So a module is evaluated by
`functional_call` within an empty scope of the store, a function within a scope that holds the given tensors; both
leave the store's keys, values and identities as they were.
"""

from pyro_forget.effects.parameters.fitted import NeverFitted, is_fitted
from pyro_forget.effects.parameters.module import fresh_copy, unfitted_copy
from pyro_forget.effects.parameters.parametrised import Parametrised, unconditioned
from pyro_forget.effects.parameters.scope import loaded_store

__all__ = ["NeverFitted", "Parametrised", "fresh_copy", "is_fitted", "loaded_store", "unconditioned", "unfitted_copy"]
