"""The hooks that users and TorchRL have put on the policy itself, as a part of its forward.

``SafeModule(safe=True)`` brings actions into their bounds by one. Torch runs them around the forward of the policy, and
would run them around all that a call of the hooked policy does, while a pass of ours that enters at the forward would
miss them. So they are taken from the hooked policy and run in each forward instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tdhook_rl.internals.torch_names import take_forward_hooks

__all__ = ["hooks_of", "in_root_hooks", "take_root_hooks"]

#: The attribute of a hooked policy under which they are.
_AROUND = "_hooked_around"


class _RootHooks:
    """What is called before and after the forward of a policy, in torch's order and with what torch gives it."""

    def __init__(self, module: nn.Module) -> None:
        self._before, self._after = take_forward_hooks(module)

    @property
    def hooks(self) -> list[Callable[..., Any]]:
        return [hook for hook, *_ in (*self._before, *self._after)]

    def __call__(self, forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        waiting, output = list(self._after), None
        try:
            for hook, takes_kwargs in self._before:
                found = hook(module, args, kwargs) if takes_kwargs else hook(module, args)
                if found is not None and takes_kwargs:
                    args, kwargs = found
                elif found is not None:
                    args = found if isinstance(found, tuple) else (found,)
            output = forward(module, *args, **kwargs)
            while waiting:
                hook, takes_kwargs, _ = waiting.pop(0)
                found = hook(module, args, kwargs, output) if takes_kwargs else hook(module, args, output)
                output = output if found is None else found
        except Exception:
            for hook, takes_kwargs, always in waiting:
                if always:
                    hook(module, args, kwargs, output) if takes_kwargs else hook(module, args, output)
            raise
        return output


def take_root_hooks(module: nn.Module) -> bool:
    """Take the forward hooks of a policy away, to be run by :func:`in_root_hooks`; whether it has any."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return False
    vars(module)[_AROUND] = _RootHooks(module)
    return True


def in_root_hooks(policy: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of a hooked policy, with the hooks that were taken from it."""
    around = vars(policy).get(_AROUND)
    return forward if around is None else functools.partial(around, forward)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks of a module; of a hooked policy with those that were taken from it."""
    around = vars(module).get(_AROUND)
    taken = [] if around is None else around.hooks
    return [*taken, *module._forward_pre_hooks.values(), *module._forward_hooks.values()]
