"""What a run asks for: kinds of values, callbacks, modules, and a promise of what will have been captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.paths import Site, find_sites

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin

__all__ = ["DIRECTIONS", "OFFERED", "Act", "CacheProxy", "EarlyStop", "Kind", "caller", "kind_of", "request_sites"]

Kind = Literal["output", "input", "grad_input", "grad_output"]
DIRECTIONS: dict[str, Kind] = {
    "fwd": "output",
    "fwd_pre": "input",
    "bwd": "grad_input",
    "bwd_pre": "grad_output",
    "fwd_kwargs": "output",
    "fwd_pre_kwargs": "input",
}
#: What a callback may take beside module, key and direction (and value, where one is set).
OFFERED: dict[Kind, tuple[str, ...]] = {
    "output": ("args", "kwargs", "output"),
    "input": ("args", "kwargs"),
    "grad_input": ("grad_input",),
    "grad_output": ("grad_output",),
}
Act = Callable[[nn.Module, Tensor, dict[str, Any]], Tensor | None]


class EarlyStop(BaseException):
    """Raised by a module after which the forward was to stop.

    Not an ``Exception``: a model that catches those on its way must not resume the forward.
    """


class CacheProxy:
    """A value that a run will have captured; it keeps the cache alive.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> cache = TensorDict()
        >>> proxy = CacheProxy(cache, "layer_output")
        >>> cache["layer_output"] = torch.ones(2)
        >>> proxy.resolve().tolist()
        [1.0, 1.0]
    """

    def __init__(self, cache: TensorDictBase | dict[str, Any], key: str) -> None:
        self.cache = cache
        self.key = key

    def resolve(self) -> Any:
        """The captured value.

        Raises:
            SiteError: if it was not captured: the run has not ended, or the module did not run.
        """
        value = self.cache.get(self.key, None)
        if value is None:
            raise SiteError(
                f"nothing was captured under {self.key!r}: the run has not ended, the module did not run, or no "
                f"gradient reached it; captured: {', '.join(map(repr, self.cache.keys())) or 'nothing'}"
            )
        return value


def request_sites(hooked: HookedMixin, key: str, relative: bool) -> list[Site]:
    """The modules of a request, from the user's module (``relative``) or from the wrapper around it."""
    root = hooked.hooked_root if relative else hooked
    return find_sites(root, key, type(root).__name__)


def kind_of(direction: str) -> Kind:
    if direction not in DIRECTIONS:
        raise InputError(f"no direction is named {direction!r}; {nearest(direction, DIRECTIONS)}")
    return DIRECTIONS[direction]


def caller(callback: Callable[..., Any], offered: tuple[str, ...], key: str) -> Callable[..., Any]:
    """The callback, called with those of the offered keywords that it takes.

    Raises:
        InputError: if it requires another one.
    """
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):
        return callback
    names = ("module", "key", "direction", *offered)
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for one in parameters:
        required = one.default is one.empty and one.kind not in optional
        if required and (one.name not in names or one.kind is one.POSITIONAL_ONLY):
            raise InputError(
                f"the callback for {key!r} requires {one.name!r}, but it is called with keywords among "
                f"{', '.join(map(repr, names))}"
            )
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return callback
    taken = {one.name for one in parameters}
    return lambda **given: callback(**{name: value for name, value in given.items() if name in taken})
