"""Modules that work in place: what hooks put in the place of their output must be what flows on.

``self.relu(h)`` with ``inplace=True``, as a statement, hands nothing on but the tensor that it was given. Where a hook
of ours acts on a module that changes its input and returns it, what comes out of all hooks is written into the tensor
that the caller holds. A layer that is told to work in place, or a block with one in it, is given a copy, so that the
values that its own gradient needs are kept as well; what a block has written into it is handed on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook_rl.errors import SiteError
from tdhook_rl.internals.functorch_names import get_unwrapped, is_wrapped
from tdhook_rl.internals.torch_names import DropoutNd
from tdhook_rl.sites.known import own_class, writes_input


class _InPlaceHook:
    """Pre-hook, first hook and last hook of a module that may work in place."""

    def __init__(self, copies: bool, surely: bool) -> None:
        self.copies = copies
        self.surely = surely
        # During a call: the tensor that the caller holds, the one that the module is given, and what tells whether it
        # was written to: its version, or what it was where versions are not counted.
        self.held: Tensor | None = None
        self.given: Tensor | None = None
        self.version: int | None = None
        self.earlier: Tensor | None = None
        self.returned = False  # the module has changed what it was given, and returned it

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        value = args[0] if args else kwargs.get("input")
        if not isinstance(value, Tensor):
            return None
        self.held = value
        self.given = value.clone() if self.copies else value
        if not self.surely and not torch.compiler.is_compiling():
            memory = _memory(self.given)
            if memory.is_inference():
                self.earlier = memory.clone()
            else:
                self.version = memory._version
        if not self.copies:
            return None
        return ((self.given, *args[1:]), kwargs) if args else (args, kwargs | {"input": self.given})

    def first(self, module: nn.Module, args: tuple, output: Any) -> None:
        given = self.given
        self.returned = given is not None and output is given and (self.surely or self._is_changed(given, module))
        if given is None or self.held is None or not self.copies or output is given:
            return
        # A block gives something else, and has written into what it was given, which others read too.
        if torch.compiler.is_compiling() or self._is_changed(given, module):
            self.held.copy_(given)

    def _is_changed(self, given: Tensor, module: nn.Module) -> bool:
        if torch.compiler.is_compiling():
            raise SiteError(
                f"{own_class(module).__name__}, at which something acts, returns the tensor that it is given, and "
                "whether it has changed it cannot be seen in a compiled call: let it return a new tensor (y = x + 1 in "
                "the place of x += 1), or leave the call uncompiled"
            )
        memory = _memory(given)
        if self.earlier is not None:
            return not torch.equal(self.earlier, memory)
        return memory._version != self.version

    def last(self, module: nn.Module, args: tuple, output: Any) -> Any:
        held, returned = self.held, self.returned
        self.held, self.given, self.version, self.earlier, self.returned = None, None, None, None, False
        if held is None or not returned or not isinstance(output, Tensor) or output is held:
            return None
        return held.copy_(output)


def _memory(value: Tensor) -> Tensor:
    """The tensor inside of those that transforms wrap, which count no versions."""
    while is_wrapped(value):
        value = get_unwrapped(value)
    return value


def hand_on_in_place(module: nn.Module) -> list[RemovableHandle]:
    """After a hook that may replace the output of a module was registered: let what comes out be what flows on."""
    for number, hook in module._forward_hooks.items():
        if isinstance(getattr(hook, "__self__", None), _InPlaceHook) and hook.__name__ == "last":
            module._forward_hooks[number] = module._forward_hooks.pop(number)  # after all others
            return []
    copies = any(writes_input(child) for child in module.modules())
    if not copies and own_class(module).__module__.partition(".")[0] in ("torch", "tensordict", "torchrl"):
        return []
    # A dropout layer that is told to work in place leaves its input as it is in eval mode; so may one of the user's.
    surely = (
        writes_input(module)
        and own_class(module).__module__.startswith("torch.nn.")
        and not isinstance(module, DropoutNd)
    )
    both = _InPlaceHook(copies, surely)
    return [
        module.register_forward_pre_hook(both.before, with_kwargs=True),
        module.register_forward_hook(both.first, prepend=True),
        module.register_forward_hook(both.last, always_call=True),
    ]
