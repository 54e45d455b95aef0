"""Inputs that a policy can do without.

Sequences with ``partial_tolerant`` leave out the modules whose keys are absent.
"""

from __future__ import annotations

from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential


def optional_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """The input keys that only such modules read.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> from torch import nn
        >>> one, two = TensorDictModule(nn.ReLU(), ["a"], ["c"]), TensorDictModule(nn.ReLU(), ["b"], ["d"])
        >>> optional_keys(TensorDictSequential(one, TensorDictSequential(one, two, partial_tolerant=True)))
        ['b']
    """
    needed = _needed(policy)
    return [key for key in policy.in_keys if key not in needed]


def _needed(module: TensorDictModuleBase) -> set[NestedKey]:
    if not isinstance(module, TensorDictSequential):
        return set(module.in_keys)
    # Of an actor with `partial_tolerant` the distribution is made by all of its modules, whatever that says.
    if module.partial_tolerant and not isinstance(module, ProbabilisticTensorDictSequential):
        return set()
    found: set[NestedKey] = set()
    made: set[NestedKey] = set()
    for child in module.module:
        found |= (_needed(child) if isinstance(child, TensorDictModuleBase) else set()) - made
        made |= set(getattr(child, "out_keys", ()))
    return found & set(module.in_keys)
