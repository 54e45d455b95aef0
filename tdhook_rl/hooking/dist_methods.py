"""Methods of a policy that compute beside its forward: they refuse after the context, and count as calls before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tdhook_rl.calls.untraced import traced_whole, uncompiled
from tdhook_rl.sites.classes import own_code
from tdhook_rl.sites.runtime import vmap_level
from tdhook_rl.sites.states import watching


def dist_methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Those of a policy's class that give distributions, by name, for its hooked policies."""
    names = ("get_dist", "get_dist_params", "log_prob")
    return {name: _guarded(getattr(base, name)) for name in names if callable(getattr(base, name, None))}


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @own_code
    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = self._hooked.runtime
        if args and args[0] is runtime.source and runtime.inside() and runtime.level == vmap_level():
            return method(self, *args, **kwargs)  # a step of the call under way, on what that is of
        return whole(self, args, kwargs)

    @traced_whole
    def whole(self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():
            return uncompiled(untraced, self, args, kwargs)
        self._hooked.runtime.require_active()
        return alone(self, args, kwargs)

    def untraced(self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._hooked.runtime.require_active()
        with self._hooked.runtime.lock, self._hooked.runtime.held:
            return alone(self, args, kwargs)

    def alone(self: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self._hooked.runtime
        previous = runtime.begin(args, kwargs)
        # A loss may enter here and nowhere else.
        checks_sites = not runtime.depth and runtime.checks_sites()
        if checks_sites:
            runtime.fired = set()
        try:
            if runtime.row_hook is not None:
                runtime.row_hook.decide(self, args, kwargs)
            for one in self._hooked.passes:
                one.run(self, type(self)._base.forward, runtime.source)
            if runtime.cores and not torch.compiler.is_compiling():
                with watching(runtime, every=False):  # what a distribution holds nobody has read yet
                    found = method(self, *args, **kwargs)
            else:
                found = method(self, *args, **kwargs)
            if checks_sites and runtime.checks_sites():  # log_prob has looked in get_dist already
                runtime.require_fired()
            return found
        except Exception as error:
            self._explain(args, kwargs, error)
            raise
        finally:
            runtime.end(previous)
            self._close_routes()

    return guarded
