"""What a run can be asked to capture, and where its requests act: hooks that act in its forward only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook_rl.arguments.checked import checked
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError
from tdhook_rl.runs.requests import Act, CacheProxy, KeptRuns, Kind, request_sites
from tdhook_rl.sites.containers import first_tensor, with_first_tensor
from tdhook_rl.sites.inplace import hand_on_in_place
from tdhook_rl.sites.paths import Site
from tdhook_rl.sites.rows import as_leaf, rows_of, with_rows


class Captures:
    """What a run can be asked to capture; the run says how."""

    cache: Any  # a TensorDict, or a dict of the caller's
    _save_cache: Any
    _prefix: str

    def _capture(
        self, key: str, cache: TensorDictBase, cache_key: str | None, prefix: str, **options: Any
    ) -> CacheProxy:
        raise NotImplementedError

    @checked
    def get(
        self,
        key: str,
        *,
        cache_key: str | None = None,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> CacheProxy:
        """Capture a module's output; after the block, find what was captured.

        Args:
            key: the module path.
            cache_key: the key in :attr:`cache`; ``f"{key}_{kind}"`` by default.
            callback: returns what is captured instead, a tensor or TensorDict.
            direction: ``"fwd"``, ``"fwd_pre"``, ``"bwd"`` or ``"bwd_pre"``; ``"fwd_kwargs"`` and
                ``"fwd_pre_kwargs"`` are the first two.
            prepend: act before the hooks that are there.
            relative: start the path at the user's module (``True``) or at the wrapping TensorDictModule.
        """
        options = {"callback": callback, "direction": direction, "prepend": prepend, "relative": relative}
        return self._capture(key, self.cache, cache_key, "", **options)

    @checked
    def save(
        self,
        key: str,
        *,
        cache_key: str | None = None,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> CacheProxy:
        """As :meth:`get`, into ``cache=`` and under ``f"{run_name}{run_sep}{key}_{kind}"``."""
        cache = self.cache if self._save_cache is None else self._save_cache
        options = {"callback": callback, "direction": direction, "prepend": prepend, "relative": relative}
        return self._capture(key, cache, cache_key, self._prefix, **options)

    def get_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input."""
        return self.get(key, direction="fwd_pre", **options)

    def save_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="fwd_pre", **options)

    def get_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input."""
        return self.get(key, direction="bwd", **options)

    def save_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="bwd", **options)

    def get_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output."""
        return self.get(key, direction="bwd_pre", **options)

    def save_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output, as :meth:`save`."""
        return self.save(key, direction="bwd_pre", **options)


class Placing(Captures):
    """The hooks of a run; which requests there are, and when the model runs, is :class:`HookedModuleRun`'s."""

    hooked: HookedPolicy
    _grad_enabled: bool
    _handles: list[RemovableHandle]
    _points: list[Tensor]  # whose gradients are asked for
    _running: bool  # in the run's own forward
    _busy: bool  # in a callback of the run's
    _acts_always: bool  # a request outside a run

    def _place(
        self, key: str, kind: Kind, act: Act, prepend: bool, relative: bool, kept: KeptRuns | None = None
    ) -> None:
        if kind in ("grad_input", "grad_output"):
            self._grad_enabled = True

        runtime = self.hooked._hooked.runtime

        def called(module: nn.Module, value: Tensor, given: dict[str, Any], index: int) -> Tensor | None:
            # The user's callback may call the hooked module: that call is not this run.
            busy, self._busy = self._busy, True
            try:
                return act(module, value, given, index)
            finally:
                self._busy = busy

        def on_gradient(module: nn.Module, value: Tensor, index: int) -> Tensor:
            if not value.requires_grad:
                value = as_leaf(value)
            point = value.view_as(value)  # a node of its own: it sees the gradient through this module only
            point.register_hook(lambda gradient: called(module, gradient, {kind: (gradient,)}, index))
            self._points.append(point)
            return point.clone()  # what follows may work on it in place

        def which(site: Site, name: str) -> int | None:
            """Which run of the site is under way; None where nothing is to be done in it."""
            if not self._acts():
                return None
            index = runtime.run_of(name)
            if kept is not None:
                kept.note(index)
            return None if isinstance(site.run, int) and 0 <= site.run != index else index

        def before(site: Site, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            index = which(site, name)
            if index is None:
                return None
            # Models of transformers pass some inputs by name only.
            given = args if args else kwargs
            packed = args and isinstance(args[0], tuple)
            tensor = args[0] if packed else first_tensor(given, module, key, "in_keys")
            value, disguise = rows_of(tensor, module, key, runtime)
            if kind == "input":
                new = called(module, value, {"args": args, "kwargs": kwargs}, index)
            else:
                new = on_gradient(module, value, index)
            if new is None:
                return None
            if any(isinstance(one, TensorDictBase) for one in (*args, *kwargs.values())):
                raise InputError(
                    f"{key!r} ({type(module).__name__}) reads its input from the caller's TensorDict, which a run does "
                    "not change: name the module inside it"
                )
            new = new if disguise is None else disguise(new)
            given = with_first_tensor(given, new, module, "in_keys")
            return (given, kwargs) if args else (args, given)

        def after(site: Site, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            index = which(site, name)
            if index is None:
                return None
            value, disguise = rows_of(output, module, key, runtime)
            raw = {"args": args, "kwargs": kwargs, "output": output}
            new = called(module, value, raw, index) if kind == "output" else on_gradient(module, value, index)
            return None if new is None else with_rows(output, new, module, disguise)

        sites = request_sites(self.hooked, key, relative, acts=kept is None)
        with runtime.lock:  # a forward of another thread goes through the hooks
            for site in sites:
                name = self._name()
                if kind in ("input", "grad_input"):
                    hook = functools.partial(before, site, name)
                    handle = site.module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True)
                else:
                    hook = functools.partial(after, site, name)
                    handle = site.module.register_forward_hook(hook, prepend=prepend, with_kwargs=True)
                    self._handles += hand_on_in_place(site.module)
                self._handles.append(handle)

    def _acts(self) -> bool:
        """Whether the forward under way is the one that was asked about."""
        return self._acts_always or (self._running and not self._busy)

    def _name(self) -> str:
        """Under which the runs of a module are counted for one request."""
        return f"run:{id(self)}:{len(self._handles)}"
