"""The forwards of tensordict's modules without their decorators, where these only take time.

One decorator makes a TensorDict of loose tensors, one skips what is there already. Called with a TensorDict, and unless
existing entries are skipped, they do nothing, for as long as a small layer takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    skip_existing,
)

_BARE: dict[Callable[..., Any], Callable[..., Any]] = {
    cls.forward: inspect.unwrap(cls.forward)
    for cls in (
        TensorDictModule,
        TensorDictSequential,
        ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential,
    )
}


def is_decorated(forward: Callable[..., Any]) -> bool:
    """Whether a forward is one of tensordict's own."""
    return forward in _BARE


def undecorated(forward: Callable[..., Any], args: tuple) -> Callable[..., Any]:
    """The same forward for these arguments, without its decorators where they have nothing to do."""
    bare = _BARE.get(forward)
    if bare is None or not args or not isinstance(args[0], TensorDictBase):
        return forward
    return forward if torch.compiler.is_compiling() or skip_existing() else bare
