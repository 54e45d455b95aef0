"""Requests on the hooked module itself, outside a run; and a time without the hooks of its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDict
from torch.utils.hooks import RemovableHandle

from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.runs.requests import request_sites, without_methods
from tdhook_rl.runs.run import HookedModuleRun
from tdhook_rl.runs.site_table import site_table
from tdhook_rl.sites.forking import TurnLock
from tdhook_rl.sites.rows import RecurrentHook

#: How torch registers a hook of each direction, with its options.
_REGISTER: dict[str, tuple[str, dict[str, bool]]] = {
    "fwd": ("register_forward_hook", {}),
    "fwd_kwargs": ("register_forward_hook", {"with_kwargs": True}),
    "fwd_pre": ("register_forward_pre_hook", {}),
    "fwd_pre_kwargs": ("register_forward_pre_hook", {"with_kwargs": True}),
    "bwd": ("register_full_backward_hook", {}),
    "bwd_pre": ("register_full_backward_pre_hook", {}),
}


class Handles:
    """The hooks of one request; :meth:`remove` takes them away."""

    def __init__(self, handles: list[RemovableHandle], lock: TurnLock) -> None:
        self._handles = handles
        self._lock = lock  # a forward of another thread goes through the hooks

    def remove(self) -> None:
        with self._lock:
            for handle in self._handles:
                handle.remove()


def direct_methods() -> dict[str, Callable[..., Any]]:
    """The requests of a run as methods of the hooked module itself: they last until their handle is removed.

    ``set*(key, value)`` and ``stop(key)`` return a handle; ``get*(cache, key)`` and ``save*(cache, key)``, which are
    one without the name of a run, a handle and a proxy. ``stop`` raises
    :class:`tdhook_rl.runs.requests.EarlyStop` out of the call. ``register_submodule_hook(key, hook)`` registers a hook
    of the user's, called as torch calls it.
    ``sites(data)`` lists the modules that can be named (:func:`tdhook_rl.runs.site_table.site_table`).
    """

    def request(name: str) -> Callable[..., Any]:
        def method(self: HookedPolicy, *args: Any, **options: Any) -> Any:
            captures = not name.startswith(("set", "stop"))
            run = HookedModuleRun(self, TensorDict(), run_cache=args[0] if captures else None)
            run._state, run._acts_always = "open", True
            proxy = getattr(run, name.replace("save", "get"))(*(args[1:] if captures else args), **options)
            handles = Handles(run._handles, self._hooked.runtime.lock)
            return (handles, proxy) if captures else handles

        method.__name__ = name
        method.__doc__ = f"As ``run.{name}``, until the returned handle is removed."
        return method

    names = [f"{verb}{kind}" for verb in ("get", "save", "set") for kind in ("", "_input", "_grad", "_grad_output")]
    return {name: request(name) for name in (*names, "stop")} | {
        "register_submodule_hook": register_submodule_hook,
        "sites": site_table,
    }


def register_submodule_hook(
    self: HookedPolicy,
    key: str,
    hook: Callable[..., Any],
    direction: str = "fwd",
    prepend: bool = False,
    relative: bool = True,
) -> Handles:
    """Register a hook of one's own on a submodule of the hooked copy, until the returned handle is removed.

    Args:
        key: the module path or pattern.
        hook: called with what torch gives a hook of this direction, and may return what torch lets it return.
        direction: ``"fwd"``, ``"fwd_pre"``, ``"bwd"``, ``"bwd_pre"``, or with keyword arguments ``"fwd_kwargs"`` and
            ``"fwd_pre_kwargs"``.
        prepend: act before the hooks that are there.
        relative: start the path at the user's module (``True``) or at the wrapping TensorDictModule.
    """
    if direction not in _REGISTER:
        raise InputError(f"no direction is named {direction!r}; {nearest(direction, _REGISTER)}")
    register, options = _REGISTER[direction]
    sites = request_sites(self, key, relative)
    for site in sites:
        if site.run is not None:
            raise SiteError(
                f"{site.name!r} names a run of a module, but a hook of one's own is called in all of them: leave "
                f"'@{site.run}' out"
            )
    lock = self._hooked.runtime.lock
    with lock:
        return Handles([getattr(site.module, register)(hook, prepend=prepend, **options) for site in sites], lock)


@contextmanager
def disabled_hooks(hooked: HookedPolicy) -> Iterator[HookedPolicy]:
    """The hooked module without the hooks and results of its methods, for a while."""
    runtime = hooked._hooked.runtime
    stores: list[tuple[Mapping[int, Any], dict[int, Any], dict[int, Any]]] = []
    # No key is read for them, and that they do not act is meant.
    state = hooked._hooked
    kept = runtime.row_hook, runtime.expected, state.reads, state.passes
    try:
        runtime.row_hook, runtime.expected, state.reads, state.passes = None, [], [], []
        with runtime.lock:
            for module in hooked.modules():
                for store in (module._forward_hooks, module._forward_pre_hooks):
                    taken = {number: hook for number, hook in store.items() if _ours(hook)}
                    if taken:
                        stores.append((store, dict(store), taken))
                    for number in taken:
                        del store[number]  # type: ignore[attr-defined]
        with without_methods(hooked):
            yield hooked
    finally:
        runtime.row_hook, runtime.expected, state.reads, state.passes = kept
        with runtime.lock:
            for store, before, taken in stores:
                now = {**store, **taken}  # others may have come and gone
                order = [number for number in before if number in now] + [one for one in now if one not in before]
                store.clear()  # type: ignore[attr-defined]
                store.update({number: now[number] for number in order})  # type: ignore[attr-defined]


def _ours(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", hook))
    if owner is RecurrentHook:  # it neither acts nor writes
        return False
    return owner.__module__.startswith("tdhook_rl.")
