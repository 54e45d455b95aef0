"""Forwards without tensordict's decorators, where these only take time.

One decorator makes a TensorDict of loose tensors, one skips what is there already. Called with a TensorDict, and unless
existing entries are skipped, they do nothing, for as long as a small layer takes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import skip_existing

from tdhook_rl.arguments.keys import is_tensordict
from tdhook_rl.internals.tensordict_names import DISPATCH, SKIP


def _bare(forward: Any) -> Any:
    """What is below the decorators."""
    while isinstance(forward, types.FunctionType):
        code = forward.__code__
        if code is not DISPATCH and code is not SKIP:  # a set would hash all of a code object
            break
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def is_decorated(forward: Callable[..., Any]) -> bool:
    """Whether a forward has these decorators."""
    return _bare(forward) is not forward


def undecorated(forward: Callable[..., Any], args: tuple) -> Callable[..., Any]:
    """The same forward for these arguments, without its decorators where they have nothing to do."""
    bare = _bare(forward)
    if bare is forward or not args or not is_tensordict(args[0]):
        return forward
    return forward if torch.compiler.is_compiling() or skip_existing() else bare
