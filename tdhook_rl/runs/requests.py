"""What a run asks for: kinds of values, callbacks, modules, and a promise of what will have been captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.sites.paths import Run, Site, find_sites, require_apart, require_counted
from tdhook_rl.sites.repeats import stacked
from tdhook_rl.sites.runtime import Runtime

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
#: Given the module, the value, what a callback is offered, and which run of the module it is.
Act = Callable[[nn.Module, Tensor, dict[str, Any], int], Tensor | None]


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


def request_sites(hooked: HookedPolicy, key: str, relative: bool, acts: bool = False) -> list[Site]:
    """The modules of a request, from the user's module (``relative``) or from the wrapper around it.

    Raises:
        SiteError: if there is none; or, for a request that ``acts`` while the model runs, if a pattern catches more
            than is meant, or a run is counted from the last.
    """
    root = hooked.hooked_root if relative else hooked
    sites = find_sites(root, key, runs=True)
    if acts:
        require_apart(root, key, sites)
        require_counted(sites)
    return sites


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
        # What is called is a module's forward; the signature of the module itself would be anything.
        taking = callback.forward if isinstance(callback, nn.Module) else callback
        parameters = inspect.signature(taking).parameters.values()
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


class KeptRuns:
    """Which runs of a module a request captures, and what it has of them."""

    def __init__(self, key: str, run: Run, runtime: Runtime) -> None:
        self.key = key
        self.run = run
        self.runtime = runtime
        self.batch = torch.Size(())
        self.times = 0
        self.values: dict[int, Any] = {}

    def note(self, index: int) -> None:
        """A run begins."""
        if not index:
            self.values.clear()
        self.times, self.batch = index + 1, self.runtime.batch or torch.Size(())

    def of_runs(self, value: Any, index: int) -> Any:
        """What is to be kept once the value of one run is there; ``None`` for nothing yet."""
        if isinstance(self.run, int) and self.run >= 0:
            return value
        if self.run is None or self.run == -1:  # gradients arrive from the last run on
            return value if index == self.times - 1 else None
        self.values[index] = value
        if self.run != "all":
            return self.values.get(self.times + self.run)
        if not isinstance(value, Tensor):
            raise InputError(
                f"{self.key!r} keeps all runs in one tensor, but the callback gave a {type(value).__name__}"
            )
        if len(self.values) < self.times:
            return None
        return stacked(tuple(self.values[one] for one in range(self.times)), self.batch, self.key)


@contextmanager
def without_methods(hooked: HookedPolicy) -> Iterator[None]:
    """A run captures what it was asked for; per-step methods of the context that observe are left out."""
    steps, hooked._hooked.steps = hooked._hooked.steps, []
    try:
        yield
    finally:
        hooked._hooked.steps = steps
